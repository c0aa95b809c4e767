"""Another library with rwkv.cpp's C API and ours, on the same file, one beside the other:

python benchmarks/compare.py THEIRS.so MODEL --threads 2 --pairs 10

Each runs in a process of its own. They take turns, ours theirs, theirs ours, …; a pair during which
something else kept the CPUs busy is measured again. The ratio is the median of the pairs' ratios,
with a 95 % interval by bootstrap: a claim whose interval holds 1 is none.

Prompts go through rwkv_eval_sequence in pieces of --chunk tokens (later versions of rwkv.cpp abort
the process for long ones). A library that has no such function reads a prompt as it decodes, and
its time per token is taken for the whole prompt's.
"""

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_float, c_size_t, c_uint32, c_void_p
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from rwkv_cpp.bench import Noise, Watch, repeat
from rwkv_cpp.library import load_rwkv_shared_library

PROMPT = 256
SECONDS = 1.0  # of decoding per turn
PAUSE = 0.1  # before a turn: threads of other libraries spin for a while when they are done


class Turn(NamedTuple):
    seconds: float  # per token
    noise: Noise | None


class Model:
    """A model behind rwkv.cpp's C API, of any of its versions."""

    def __init__(self, library: Path, path: Path, n_threads: int, chunk: int | None) -> None:
        self._c = c = ctypes.CDLL(str(library))
        c.rwkv_init_from_file.restype = c_void_p
        # The last argument, layers on a GPU, came later; functions without it don't notice.
        c.rwkv_init_from_file.argtypes = c_char_p, c_uint32, c_uint32
        self._ctx = c_void_p(c.rwkv_init_from_file(str(path).encode(), n_threads, 0))
        if not self._ctx:
            raise SystemExit(f"{library} cannot load {path}")
        c.rwkv_eval.restype = c_bool
        self._logits = (c_float * self._length("logits"))()
        self._states = [(c_float * self._length("state"))() for _ in range(2)]
        self._chunk = chunk
        self.reset()

    def _length(self, what: str) -> int:
        for name, kind in (("len", c_size_t), ("buffer_element_count", c_uint32)):
            function = getattr(self._c, f"rwkv_get_{what}_{name}", None)
            if function is not None:
                function.restype = kind
                return function(self._ctx)
        raise SystemExit(f"no function says how long the {what} is")

    def reset(self) -> None:
        self._state = None

    def _step(self, function: Callable, *what: object) -> None:
        target = self._states[self._state is self._states[0]]
        if not function(self._ctx, *what, self._state, target, self._logits):
            raise SystemExit("an evaluation failed")
        self._state = target

    def eval(self, token: int) -> None:
        self._step(self._c.rwkv_eval, c_uint32(token))

    @property
    def reads_sequences(self) -> bool:
        return hasattr(self._c, "rwkv_eval_sequence")

    def read(self, tokens: list[int]) -> None:
        function = self._c.rwkv_eval_sequence
        function.restype = c_bool
        chunk = self._chunk or len(tokens)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            self._step(function, (c_uint32 * len(part))(*part), c_size_t(len(part)))

    @property
    def logits(self) -> np.ndarray:
        return np.array(self._logits, np.float32)


def work(pipe: Connection, *arguments: object) -> None:
    """A library's process: does what it is told."""
    model = Model(*arguments)
    tokens = np.random.default_rng(0).integers(len(model.logits), size=PROMPT).tolist()
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        model.reset()
        if order == "logits":
            for token in tokens[:8]:
                model.eval(token)
            pipe.send(model.logits)
            continue
        time.sleep(PAUSE)
        watch = Watch()
        began = time.perf_counter()
        if order == "prompt" and model.reads_sequences:
            model.read(tokens)
            count, taken = PROMPT, time.perf_counter() - began
        else:
            count, taken = 0, 0.0
            while taken < SECONDS:
                model.eval(tokens[count % PROMPT])
                count += 1
                taken = time.perf_counter() - began
        pipe.send(Turn(taken / count, watch.read()))


class Player:
    def __init__(self, *arguments: object) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=work, args=(theirs, *arguments), daemon=True
        )
        process.start()
        theirs.close()

    def __call__(self, order: str) -> Turn | np.ndarray:
        self._pipe.send(order)
        try:
            return self._pipe.recv()
        except EOFError:
            raise click.ClickException(f"a library's process ended during {order!r}") from None


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of ratios drawn again from these."""
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("theirs", type=click.Path(exists=True, path_type=Path))
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--ours", type=click.Path(path_type=Path), help="[default: looked for]")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--pairs", type=click.IntRange(2), default=10, show_default=True)
@click.option("--chunk", type=click.IntRange(1), default=64, show_default=True, help="For theirs.")
def main(
    theirs: Path, model: Path, ours: Path | None, threads: int, pairs: int, chunk: int
) -> None:
    library = load_rwkv_shared_library(ours).path
    players = (
        Player(library, model, threads, None),
        Player(theirs.absolute(), model, threads, chunk),
    )
    a, b = (player("logits") for player in players)
    print(f"{model.name}, {threads} threads; theirs is {theirs.name}")
    print(f"logits differ by {np.abs(a - b).max():.2g}, the largest is {np.abs(a).max():.2g}")
    print(f"{'ms per token':<16}{'ours':>10}{'theirs':>10}{'ratio':>8}   95 % interval")
    for order in ("decode", "prompt"):
        turns = [player(order) for player in players]  # warm up
        first = 0

        def pair(order: str = order) -> tuple[Turn, Turn]:
            nonlocal first
            first = 1 - first
            turns = {i: players[i](order) for i in (first, 1 - first)}
            return turns[0], turns[1]

        turns = repeat(pair, lambda pair: [turn.noise for turn in pair], pairs)[:pairs]
        low, high = interval([b.seconds / a.seconds for a, b in turns])
        ratio = statistics.median(b.seconds / a.seconds for a, b in turns)
        name = order if order == "decode" else f"prompt of {PROMPT}"
        times = "".join(
            f"{1000 * statistics.median(turn.seconds for turn in side):>10.3f}"
            for side in zip(*turns, strict=True)
        )
        print(f"{name:<16}{times}{ratio:>8.2f}   {low:.2f} to {high:.2f}")
        loud = max((max(turn.noise or (0,)) for pair in turns for turn in pair), default=0)
        if loud > 0.01:
            print(f"  disturbed: others had up to {loud:.1%} of the CPUs' time")


if __name__ == "__main__":
    main()
