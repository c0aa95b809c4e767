"""train/data.py: what is held out, what a step learns from, and what a resumed run sees."""

from collections import Counter

import numpy as np
import pytest
from rwkv_cpp import RWKVFileError
from rwkv_cpp.token_data import TokenData

pytest.importorskip("torch")

from rwkv_cpp.train.data import IGNORED, Streams, Windows, split


def data_of(*sizes):
    """Documents of so many tokens, each of which is its own position."""
    starts = np.cumsum([0, *sizes])
    return TokenData(np.arange(starts[-1], dtype=np.uint16), starts[:-1].astype(np.int64))


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [
        ([100], 90),
        ([88, 12], 88),
        ([93, 7], 93),
        ([84, 16], 90),  # too far away
        ([97, 3], 90),
        ([1, 99], 90),
        ([86, 3, 2, 9], 89),
        ([50, 20, 15, 15], 85),
    ],
)
def test_held_out_part(sizes, cut):
    data = data_of(*sizes)
    train, held_out = split(data, 0.1)
    assert train.tokens.tolist() == [*range(cut)]
    assert held_out.tokens.tolist() == [*range(cut, 100)]
    starts = data.documents.tolist()
    assert train.documents.tolist() == [start for start in starts if start < cut]
    later = [start - cut for start in starts if start > cut]
    assert held_out.documents.tolist() == [0, *later]


# ---- windows ----


def test_windows():
    windows = Windows(data_of(7, 13), 4, 5, 1)
    seen = Counter()
    for step in range(500):
        batch = windows.draw(step)
        assert not batch.continues.any()
        assert batch.inputs.shape == batch.targets.shape == (4, 5)
        assert (batch.targets == batch.inputs + 1).all()
        assert (batch.inputs[:, 1:] == batch.inputs[:, :-1] + 1).all()
        seen.update(batch.inputs[:, 0].tolist())
    assert set(seen) == set(range(15))  # every place where a window fits
    assert max(seen.values()) < 2 * min(seen.values())


@pytest.mark.parametrize("kind", [Windows, lambda *given: Streams(*given, n_windows=2)])
def test_a_step_depends_on_its_number(kind):
    data = data_of(30, 50, 3, 40)
    steps = [kind(data, 3, 4, 7).draw(step) for step in range(30)]
    going = kind(data, 3, 4, 7)
    for step in (*range(30), 29, 3, 4, 17, 0):
        for one, other in zip(going.draw(step), steps[step], strict=True):
            assert one.tolist() == other.tolist()
    others = [kind(data, 3, 4, 8).draw(step).inputs.tolist() for step in range(30)]
    assert others != [batch.inputs.tolist() for batch in steps]


def test_too_little_data():
    Windows(data_of(6), 2, 5, 0).draw(0)
    with pytest.raises(RWKVFileError, match="has 5 tokens, a window needs 6"):
        Windows(data_of(5), 2, 5, 0)
    with pytest.raises(RWKVFileError, match="no document of two tokens"):
        Streams(data_of(1, 1, 1), 2, 5, 0, 3)


# ---- streams ----


def rows_of(streams, n_steps):
    """(row, whether it goes on, inputs, targets) of windows as they come."""
    for step in range(n_steps):
        batch = streams.draw(step)
        for row, given in enumerate(zip(*(part.tolist() for part in batch), strict=True)):
            yield row, given[2], given[0], given[1]


@pytest.mark.parametrize("n_windows", [1, 2, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_streams(batch, n_windows):
    sizes = [10, 1, 2, 33, 4, 5, 1, 61]
    data = data_of(*sizes)
    document = np.repeat(np.arange(len(sizes)), sizes)
    first = set(data.documents.tolist())
    streams = Streams(data, batch, 4, 5, n_windows)
    last, length = {}, Counter()
    targets = Counter()
    restarts = Counter()
    for row, continues, inputs, wanted in rows_of(streams, 3000):
        used = [t for t in wanted if t != IGNORED]
        assert used
        assert wanted == used + [IGNORED] * (4 - len(used))
        assert used == [i + 1 for i in inputs[: len(used)]]
        assert len({*document[inputs[: len(used)]], *document[used]}) == 1
        if continues:
            assert last[row] == inputs[0] - 1
            length[row] += 1
            assert length[row] <= n_windows
        else:
            length[row] = 1
            restarts[inputs[0]] += 1
        last[row] = inputs[-1] if len(used) == 4 else None
        targets.update(used)
    # Every token but the first of a document, as often as any other: once in a pass.
    assert set(targets) == set(range(sum(sizes))) - first
    assert max(targets.values()) - min(targets.values()) <= 2
    if n_windows == 100:
        assert set(restarts) == {0, 11, 13, 46, 50, 56}  # where documents of two tokens begin
    else:
        assert len(restarts) > 20  # long ones are cut elsewhere in each pass


def test_one_long_text_fills_all_rows():
    streams = Streams(data_of(2000), 8, 10, 0, 5)
    starts = [inputs[0] for _, continues, inputs, _ in rows_of(streams, 1) if not continues]
    assert len(set(starts)) == 8
