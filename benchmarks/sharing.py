"""What it costs to share the machine: `python benchmarks/sharing.py MODEL`

Decoding beside a busy process, with more threads than cores, and from two Python threads that share
a model's weights; and the memory of two processes that map the same file. Each is measured in turns
with decoding alone, as medians of ratios.
"""

import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from rwkv_cpp import RWKVModel
from rwkv_cpp.bench import Watch, loudest

TURNS = 5
SECONDS = 1.0


def decode(model: RWKVModel) -> float:
    """Tokens per second."""
    state, count, taken = None, 0, 0.0
    began = time.perf_counter()
    while taken < SECONDS:
        _, state = model.eval(count % 100, state)
        count += 1
        taken = time.perf_counter() - began
    return count / taken


def busy(pipe: Connection) -> None:
    """Keeps one CPU busy between messages: "on", "off"."""
    while pipe.recv() == "on":
        while not pipe.poll():
            for _ in range(10_000):
                pass
        pipe.recv()


def proportional_memory(path: Path, pipe: Connection) -> None:
    """Bytes of this process with the model loaded and used, shared pages divided among users."""
    with RWKVModel(None, path) as model:
        model.eval(0, None)
        pipe.send("ready")
        pipe.recv()
        for line in Path("/proc/self/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                pipe.send(int(line.split()[1]) * 1024)


def start(target: Callable, *arguments: object) -> Connection:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=target, args=(*arguments, theirs), daemon=True).start()
    return ours


def compare(
    alone: Callable[[], float], shared: Callable[[], float]
) -> tuple[float, float, float, float]:
    """Medians: tokens per second alone, shared, and of the ratios; and the share of the CPUs' time
    that others had while the model was to be alone."""
    noise = []

    def watched() -> float:
        watch = Watch()
        rate = alone()
        noise.append(watch.read())
        return rate

    pairs = []
    for turn in range(TURNS):
        if turn % 2:
            with_others = shared()
            pairs.append((watched(), with_others))
        else:
            pairs.append((watched(), shared()))
    ratio = statistics.median(a / b for a, b in pairs)
    return (*map(statistics.median, zip(*pairs, strict=True)), ratio, loudest(noise))


def main(path: Path) -> None:
    neighbour = start(busy)
    with RWKVModel(None, path) as model, model.clone() as clone, model.clone(8) as eight:

        def beside_a_busy_process() -> float:
            neighbour.send("on")
            time.sleep(0.1)
            rate = decode(model)
            neighbour.send("off")
            return rate

        def from_two_threads() -> float:
            """Of each."""
            rates = []
            threads = [
                threading.Thread(target=lambda m=m: rates.append(decode(m))) for m in (model, clone)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return statistics.mean(rates)

        print(f"{path.name}: tokens/s of decoding")
        print(f"{'':<28}{'alone':>10}{'shared':>10}{'slower by':>12}{'noise':>10}")
        for name, shared in {
            "beside one busy process": beside_a_busy_process,
            "8 threads": lambda: decode(eight),
            "each of two Python threads": from_two_threads,
        }.items():
            alone, with_others, ratio, noise = compare(lambda: decode(model), shared)
            print(f"{name:<28}{alone:>10.2f}{with_others:>10.2f}{ratio:>10.2f} x{noise:>10.1%}")
    pipes = [start(proportional_memory, path) for _ in range(2)]
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("measure")
    total = sum(pipe.recv() for pipe in pipes)
    size = path.stat().st_size
    print(f"two processes take {total / 1e6:.0f} MB together, the file has {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
