"""Strings that end an answer: found across the borders of tokens, while the text streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .tokenizer import StreamDecoder, Tokenizer

MAX_STOP_CHARACTERS = 1000  # a longer text is no sign that an answer is over


def stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    """One stop string or several, as a tuple. Raises ValueError for empty and for huge ones."""
    if not isinstance(stop, Iterable):
        raise TypeError(f"stop: expected a string or several, found {stop!r}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for one in stops:
        if not isinstance(one, str):
            raise TypeError(f"stop: expected strings, found {one!r}")
        if not one:
            raise ValueError("stop: a stop string is empty, which would end every answer at once")
        if len(one) > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop: a stop string has {len(one)} characters, at most {MAX_STOP_CHARACTERS}"
                f" are allowed: '{one[:20]}…'"
            )
    return stops


class StopFinder:
    """Lets a text through, piece by piece, up to a stop string.

    Held back is only what could begin one. The string that ends first counts, of several that end
    there the longest: so it doesn't matter how the text is cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """stops: as `stop_strings` returns them; none lets everything through."""
        self._stops = tuple(stops)
        self._first = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self.held = ""
        self.found: str | None = None  # the stop string; then what was before it has been let out

    def feed(self, text: str) -> str:
        """What of the text so far is let out. Nothing may follow once a stop string is found."""
        text = self.held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self.held = ""
            return text[:at]
        at = self._possible_beginning(text)
        self.held = text[at:]
        return text[:at]

    def flush(self) -> str:
        """What is held back, for the text ends here."""
        held, self.held = self.held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Where the longest end of the text starts that a stop string begins with."""
        for at in range(max(len(text) - self._longest + 1, 0), len(text)):
            if text[at] in self._first:
                end = text[at:]
                if any(stop.startswith(end) for stop in self._stops):
                    return at
        return len(text)


def tokens_before(
    tokenizer: Tokenizer, tokens: Sequence[int], n_characters: int
) -> tuple[list[int], str]:
    """The tokens that lie in the first characters of their text as a whole, and the rest of these
    characters, of which the next token holds more."""
    decoder = StreamDecoder(tokenizer)
    text = ""
    n_kept, n_covered = 0, 0
    for i, token in enumerate(tokens, start=1):
        text += decoder.feed(token)
        if len(text) > n_characters:
            break
        if not decoder.pending:
            n_kept, n_covered = i, len(text)
    return list(tokens[:n_kept]), text[n_covered:n_characters]
