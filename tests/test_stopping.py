"""stopping.py: stop strings in a stream of text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_cpp import load_tokenizer
from rwkv_cpp.stopping import MAX_STOP_CHARACTERS, StopFinder, stop_strings, tokens_before
from rwkv_cpp.tokenizer import WorldTokenizer

few_letters = st.text("ab\n", max_size=12)


def test_held_back_is_only_what_may_begin_a_stop_string():
    finder = StopFinder(["\n\nUser", "END"])
    assert finder.feed("Hello\n") == "Hello"
    assert finder.held == "\n"
    assert finder.feed("\n") == ""
    assert finder.feed("\n") == "\n"  # the first of three cannot be part of it any more
    assert finder.feed("Us") == ""
    assert finder.feed("e E") == "\n\nUse "
    assert finder.feed("ND") == ""
    assert finder.found == "END"
    assert finder.held == ""


def test_rest_is_let_out_in_the_end():
    finder = StopFinder(["stop"])
    assert finder.feed("no sto") == "no "
    assert finder.flush() == "sto"
    assert finder.flush() == ""
    assert StopFinder([]).feed("anything") == "anything"


def test_string_that_ends_first_counts_and_then_the_longest():
    finder = StopFinder(["bcd", "abcde", "c"])
    assert finder.feed("abcde") == "ab"
    assert finder.found == "c"
    finder = StopFinder(["d", "bcd", "cd"])
    assert finder.feed("abcde") == "a"
    assert finder.found == "bcd"


def oracle(text, stops):
    """Reads character by character and looks at all ends."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(few_letters, max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_pieces_do_not_matter(pieces, stops):
    finder = StopFinder(stops)
    text, seen = "", ""
    for piece in pieces:
        seen += piece
        text += finder.feed(piece)
        if finder.found:
            break
        assert seen == text + finder.held
        # Held back is exactly the longest end that a stop string goes on from.
        starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
        ends = [seen[at:] for at in range(len(seen)) if seen[at:] in starts]
        assert finder.held == max(ends, key=len, default="")
    text += finder.flush()
    assert (text, finder.found) == oracle(seen, stops)


def test_bad_stop_strings():
    assert stop_strings("one") == ("one",)
    assert stop_strings(["one", "two"]) == ("one", "two")
    for bad, kind in (
        ("", ValueError),
        (["a", ""], ValueError),
        ("x" * (MAX_STOP_CHARACTERS + 1), ValueError),
        ([5], TypeError),
        ([b"a"], TypeError),
    ):
        with pytest.raises(kind, match="stop"):
            stop_strings(bad)


def test_tokens_before():
    words = [bytes([value]) for value in range(256)] + [b"Hello", b"lo\n\n", b"\n\n"]
    tokenizer = WorldTokenizer(300, words)
    hello, lo, breaks = 257, 258, 259
    assert tokens_before(tokenizer, [hello, lo, breaks], 5) == ([hello], "")
    assert tokens_before(tokenizer, [hello, lo, breaks], 7) == ([hello], "lo")
    assert tokens_before(tokenizer, [hello, lo, breaks], 9) == ([hello, lo], "")
    assert tokens_before(tokenizer, [hello, lo], 0) == ([], "")
    assert tokens_before(tokenizer, [hello, 0, lo], 5) == ([hello, 0], "")
    # A character of several tokens lies before the end only with all of them.
    letters = load_tokenizer(256).encode("aé€")
    tokenizer = load_tokenizer(256)
    assert tokens_before(tokenizer, letters, 1) == (letters[:1], "")
    assert tokens_before(tokenizer, letters, 2) == (letters[:3], "")
    assert tokens_before(tokenizer, letters[:5], 2) == (letters[:3], "")
