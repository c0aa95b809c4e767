"""The longest prefix is found, in memory and on disk, by one process or two (D-01..D-08)."""

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv_cpp import RWKV, PrefixCache, State, StateNotice
from rwkv_cpp.fingerprint import Fingerprint

FINGERPRINT = Fingerprint.known("f" * 32, "e" * 32)
NBYTES = 4 * (10 + 3)  # of a state without tokens


def make_state(tokens, value: float = 1.0, **options) -> State:
    options = {"n_layer": 1, "fingerprint": FINGERPRINT, "arithmetic": "A16"} | options
    return State(np.full(10, value, np.float32), np.ones(3, np.float32), tokens, **options)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


posix = pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and signals")


# ---- what is found ----


def test_the_longest_prefix():
    cache = PrefixCache()
    assert cache.longest("k", [1, 2, 3]) is None
    for tokens in [1], [1, 2, 3], [1, 2, 4], [1, 2, 3, 4, 5]:
        cache.store("k", make_state(tokens, len(tokens)))
    for tokens, found in (
        ([1, 2, 3, 4], [1, 2, 3]),
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([1, 2], [1]),
        ([1, 9], [1]),
        ([2, 1], None),
        ([], None),
    ):
        state = cache.longest("k", tokens)
        assert (state and state.tokens.tolist()) == found
    assert cache.longest("k", np.array([1, 2, 4, 0])) == make_state([1, 2, 4], 3)


TOKENS = st.lists(st.integers(0, 2), max_size=6)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("ab"), TOKENS)), st.lists(TOKENS, max_size=5))
def test_the_longest_prefix_as_a_search_through_all(stored, asked):
    cache = PrefixCache()
    for key, tokens in stored:
        cache.store(key, make_state(tokens))
    for tokens in asked:
        naive = [s for key, s in stored if key == "a" and s and tokens[: len(s)] == s]
        found = cache.longest("a", tokens)
        assert (found.tokens.tolist() if found else []) == max(naive, key=len, default=[])


def test_keys_share_nothing():  # D-02
    cache = PrefixCache()
    cache.store("model salt1", make_state([1, 2]))
    assert cache.longest("model salt2", [1, 2]) is None
    assert cache.longest("model salt", [1, 2]) is None


def test_no_two_keys_and_tokens_are_confused(tmp_path):  # D-04
    cache = PrefixCache(folder=tmp_path)
    chars = b"\x01\0\0\0".decode()  # the bytes of token 1
    pairs = [("", [1, 1]), (chars, [1]), ("a", [1]), ("a\0", [1]), ("", [1]), ("", [257])]
    for i, (key, tokens) in enumerate(pairs):
        cache.store(key, make_state(tokens, i))
    assert len(cache) == len(files(tmp_path)) == len(pairs)
    assert len({path.stem.split("-")[2] for path in files(tmp_path)}) == len(pairs)
    for i, (key, tokens) in enumerate(pairs):
        assert cache.longest(key, tokens) == make_state(tokens, i)
    with pytest.raises(TypeError, match=r"tokens\[0\] must be an integer, not str"):
        cache.longest("", ["1"])


def test_a_collision_is_no_hit(monkeypatch, tmp_path):  # D-01
    class Constant:
        def __init__(self, *_, **__):
            pass

        def update(self, _):
            pass

        def hexdigest(self):
            return "0" * 64

    monkeypatch.setattr("rwkv_cpp.prefix_cache.hashlib.blake2b", Constant)
    monkeypatch.setattr("rwkv_cpp.prefix_cache._key_digest", lambda key: "0" * 16)
    cache = PrefixCache()
    cache.store("k", make_state([1, 2]))
    assert cache.longest("k", [1, 3]) is None
    assert cache.longest("k", [1, 2]) == make_state([1, 2])


def test_states_that_tokens_do_not_tell_are_not_kept(tmp_path):
    cache = PrefixCache(folder=tmp_path)
    for state in (
        make_state([1], arithmetic=None),
        make_state([]),
        State(np.ones(10, np.float32), None, [1], n_layer=1, arithmetic="A16"),
    ):
        cache.store("k", state)
    assert (len(cache), cache.nbytes, files(tmp_path)) == (0, 0, [])


# ---- memory ----


def test_copies_go_in_and_out():  # D-07
    cache = PrefixCache()
    state = make_state([1])
    cache.store("k", state)
    state.values[:] = 7
    found = cache.longest("k", [1])
    assert found == make_state([1])
    found.values[:] = 8
    found.tokens.append(3)
    assert cache.longest("k", [1]) == make_state([1])


def test_the_least_recently_used_goes_first():  # D-08
    cache = PrefixCache(max_bytes=3 * (NBYTES + 4))
    for token in 1, 2, 3:
        cache.store("k", make_state([token]))
    assert (len(cache), cache.nbytes) == (3, cache.max_bytes)
    cache.longest("k", [1])
    cache.store("k", make_state([4]))
    assert [bool(cache.longest("k", [token])) for token in (1, 2, 3, 4)] == [1, 0, 1, 1]
    cache.store("k", make_state(range(200)))  # larger than all
    assert cache.longest("k", range(200)) is None
    assert (len(cache), cache.nbytes) == (3, cache.max_bytes)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20)), st.integers(0, 400))
def test_the_accounts_are_exact(stored, max_bytes):
    cache = PrefixCache(max_bytes)
    for tokens in stored:
        cache.store("k", make_state(tokens))
        assert cache.nbytes == sum(state.nbytes for state in cache._states.values())
        assert cache.nbytes <= max_bytes
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_many_entries_and_a_long_prompt():
    cache = PrefixCache()
    prompt = list(range(20_000))
    for length in range(10, 20_000, 10):
        cache.store("k", make_state(prompt[:length]) if length < 1000 else _short(length))
    start = time.process_time()
    found = cache.longest("k", prompt)
    assert time.process_time() - start < 1
    assert len(found.tokens) == 990


def _short(length: int) -> State:
    """One of 2000 that do not fit, but whose lengths have to be looked at."""
    return make_state([length] * (length // 10))


def test_threads():
    cache = PrefixCache(max_bytes=20 * (NBYTES + 4))
    errors = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(300):
                token = int(random.integers(40))
                cache.store("k", make_state([token], token))
                token = int(random.integers(40))
                found = cache.longest("k", [token, 1])
                assert found is None or (found.values == token).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert cache.nbytes == sum(state.nbytes for state in cache._states.values())


# ---- disk ----


def test_another_cache_finds_it(tmp_path):
    folder = tmp_path / "a" / "states"
    PrefixCache(folder=folder).store("k", make_state([1, 2]))
    cache = PrefixCache(folder=folder)
    assert len(cache) == 0
    assert cache.longest("k", [1, 2, 3]) == make_state([1, 2])
    assert len(cache) == 1
    assert cache.longest("other", [1, 2, 3]) is None


def test_memory_and_disk_together(tmp_path):
    one, two = PrefixCache(folder=tmp_path), PrefixCache(folder=tmp_path)
    one.store("k", make_state([1]))
    two.store("k", make_state([1, 2]))
    assert one.longest("k", [1, 2, 3]) == make_state([1, 2])
    assert two.longest("k", [1, 3]) == make_state([1])


@posix
def test_only_this_user_may_read(tmp_path):
    before = os.umask(0)
    try:
        PrefixCache(folder=tmp_path / "states").store("k", make_state([1]))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "states").stat().st_mode) == 0o700
    for path in (tmp_path / "states").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_damaged_files_are_dropped(tmp_path):
    PrefixCache(folder=tmp_path).store("k", make_state([1]))
    PrefixCache(folder=tmp_path).store("k", make_state([1, 2]))
    longer = next(path for path in files(tmp_path) if "-2-" in path.name)
    data = bytearray(longer.read_bytes())
    data[-1] ^= 1
    longer.write_bytes(data)
    (tmp_path / "notes.safetensors").write_text("not ours")
    cache = PrefixCache(folder=tmp_path)
    assert cache.longest("k", [1, 2]) == make_state([1])
    assert not longer.exists()
    assert (tmp_path / "notes.safetensors").exists()


def test_a_file_under_a_wrong_name_is_no_hit(tmp_path):
    cache = PrefixCache(folder=tmp_path)
    cache.store("k", make_state([1, 2]))
    (path,) = files(tmp_path)
    make_state([1, 3]).save(path)
    assert PrefixCache(folder=tmp_path).longest("k", [1, 2]) is None


def test_the_disk_has_a_limit(tmp_path):
    size = len(make_state([1]).to_bytes())
    cache = PrefixCache(0, tmp_path, 3 * size)
    for token in 1, 2, 3:
        cache.store("k", make_state([token]))
        for path in files(tmp_path):  # as if a second had passed
            status = path.stat()
            os.utime(path, ns=(0, status.st_mtime_ns - 10**9))
    assert cache.longest("k", [1])
    cache.store("k", make_state([4]))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3 * size
    assert [bool(cache.longest("k", [token])) for token in (1, 2, 3, 4)] == [1, 0, 1, 1]
    cache.store("k", make_state(range(size)))
    assert len(files(tmp_path)) == 3


def test_a_failing_disk_costs_a_notice(tmp_path, monkeypatch):
    cache = PrefixCache(folder=tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(StateNotice, match="a state was not kept.*No space") as caught:
        cache.store("k", make_state([1]))
    assert caught[0].filename == __file__
    assert cache.longest("k", [1]) == make_state([1])
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        PrefixCache(folder=tmp_path / "file")
    with pytest.raises(ValueError, match="max_disk_bytes must be 0 to"):
        PrefixCache(folder=tmp_path, max_disk_bytes=-1)
    with pytest.raises(ValueError, match="max_bytes must be 0 to"):
        PrefixCache(-1)


def test_the_folder_may_vanish(tmp_path):
    cache = PrefixCache(folder=tmp_path / "states")
    cache.store("k", make_state([1]))
    for path in (tmp_path / "states").iterdir():
        path.unlink()
    (tmp_path / "states").rmdir()
    assert cache.longest("k", [1]) == make_state([1])
    cache.store("k", make_state([2]))
    assert len(files(tmp_path / "states")) == 1


# ---- several processes ----


def _work(folder: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    size = len(make_state([1]).to_bytes())
    cache = PrefixCache(0, folder, 8 * size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            token = int(random.integers(12))
            cache.store("k", make_state([token], token))
            token = int(random.integers(12))
            found = cache.longest("k", [token, 1])
            if found is not None and not (found.values == token).all():
                raise SystemExit(3)


def test_two_processes(tmp_path):
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "fork")
    workers = [context.Process(target=_work, args=(tmp_path, seed)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    size = len(make_state([1]).to_bytes())
    assert 0 < sum(path.stat().st_size for path in files(tmp_path)) <= 8 * size
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ""}


@posix
def test_a_killed_writer_leaves_nothing_wrong(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_prefix_cache import PrefixCache, make_state
PrefixCache(folder=Path(sys.argv[1])).store("k", make_state([1]))
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
PrefixCache(folder=Path(sys.argv[1])).store("k", make_state([1, 2]))
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    cache = PrefixCache(folder=tmp_path)
    assert cache.longest("k", [1, 2]) == make_state([1])
    cache.store("k", make_state([3]))  # the lock was let go; leftovers are removed
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    assert len(files(tmp_path)) == 2


# ---- with a model ----


def same_bits(a: State, b: State) -> bool:
    return a == b and a.logits.tobytes() == b.logits.tobytes()


def test_cached_and_uncached_runs_give_equal_bits(tmp_path):
    prompts = "ROMEO:\nI", "ROMEO:\nI am here", "ROMEO:\nI am", "ROMEO:\nI am here", "JULIET:"
    with RWKV() as plain:
        expected = [plain.generate(prompt, max_tokens=8, seed=1) for prompt in prompts]
    for expected_cached in [0, 8, 8, 16, 0], [8, 16, 11, 16, 7]:  # at first, after a restart
        with RWKV(prefix_cache=PrefixCache(folder=tmp_path)) as rwkv:
            for prompt, right, n_cached in zip(prompts, expected, expected_cached, strict=True):
                answer = rwkv.generate(prompt, max_tokens=8, seed=1)
                assert answer.text == right.text
                assert same_bits(answer.state, right.state)
                assert answer.timings.cached_tokens == n_cached


def test_what_is_read_after_a_rounded_state_is_not_kept():
    cache = PrefixCache()
    with RWKV(prefix_cache=cache) as rwkv:
        rounded = State.from_bytes(rwkv.read("ROMEO:").to_bytes("float16"))
        before = len(cache)
        rwkv.generate(" I", state=rounded, max_tokens=3)
        assert len(cache) == before


def test_models_of_other_arithmetic_share_nothing():
    cache = PrefixCache()
    with RWKV(prefix_cache=cache) as one, RWKV(prefix_cache=cache, head="Q8_0") as other:
        one.read("ROMEO:")
        assert other.generate("ROMEO:", max_tokens=1).timings.cached_tokens == 0
        assert one.generate("ROMEO:", max_tokens=1).timings.cached_tokens == 6
