"""Other programs and ours, one beside the other: what each does with a model of the same shape and
random weights.

python benchmarks/peers.py torch rwkv bf16 OURS.bin ...
python benchmarks/peers.py llama LLAMA/bin/llama-bench THEIRS.gguf OURS.bin

They take turns, round by round, and their figures are medians. README.md in this folder says how
the other programs are installed.
"""

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rwkv_cpp import RWKVModel, load_rwkv_shared_library
from rwkv_cpp.bench import (
    PROMPT,
    Round,
    cpu_name,
    loudest,
    measure_round,
    operations,
    reading_share,
)
from rwkv_cpp.ggmf import read_index
from rwkv_cpp.library import Limits
from rwkv_cpp.load_options import load_options

BATCH = 8
PAUSE = 0.3  # before a turn of ours: threads of other programs spin for a while when they are done
LLAMA_PROMPT, LLAMA_TOKENS = 512, 64

models = click.argument(
    "paths", metavar="OURS...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
n_threads = click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
n_rounds = click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)


class Ours:
    """A model of ours, loaded."""

    def __init__(self, path: Path, threads: int, options: dict[str, Any]) -> None:
        self._library = load_rwkv_shared_library()
        self._model = RWKVModel(self._library, path, threads, **options)
        self._threads = threads
        self.n_bytes = self._library.rwkv_estimate(path, **options).token
        _, records = read_index(path)
        shapes = [r.shape for r in records if r.key.startswith("blocks.") and len(r.shape) == 2]
        self.layer_weights = sum(rows * columns for rows, columns in shapes)

    def limits(self, n_bytes: int) -> Limits:
        return self._library.rwkv_measure(self._threads, min(n_bytes, 1 << 30))

    def round(self) -> Round:
        time.sleep(PAUSE)
        return measure_round(self._library, self._model, self._threads, min(self.n_bytes, 1 << 30))


@contextmanager
def worker(command: list[str]) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        yield process
        process.stdin.close()


def ask(process: subprocess.Popen) -> dict[str, float]:
    print(file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise click.ClickException("the other program ended early")
    return json.loads(line)


@click.group(help=__doc__.partition("\n")[0])
def main() -> None:
    print(cpu_name())


@main.command("torch", help="A package on torch: pip rwkv or transformers.")
@click.argument("package", type=click.Choice(["rwkv", "transformers"]))
@click.argument("type_name", metavar="TYPE", type=click.Choice(["fp32", "bf16"]))
@models
@n_threads
@n_rounds
@load_options
def torch_package(
    package: str,
    type_name: str,
    paths: tuple[Path, ...],
    threads: int,
    rounds: int,
    options: dict[str, Any],
) -> None:
    header, _ = read_index(paths[0])
    script = Path(__file__).with_name("torch_peers.py")
    sizes = {
        "vocab": header.n_vocab,
        "embed": header.n_embed,
        "layers": header.n_layer,
        "prompt": PROMPT,
        "batch": BATCH,
        "threads": threads,
    }
    words = [f"--{name}={value}" for name, value in sizes.items()]
    ours = {path.stem: Ours(path, threads, options) for path in paths}
    theirs = f"{package} {type_name}"
    figures: dict[str, list[dict[str, float]]] = defaultdict(list)
    noise, reading = [], []
    with worker([sys.executable, str(script), package, type_name, *words]) as process:
        ask(process)  # warm up
        for _ in range(rounds):
            figures[theirs].append(ask(process))
            for name, model in ours.items():
                result = model.round()
                noise.append(result.noise)
                reading.append(result.limits.read)
                works = {"decode": result.decode, "prompt": result.prompt}
                figures[name].append(works | {"batch": result.batch[BATCH]})
    tokens = {"decode": 1, "prompt": PROMPT, "batch": BATCH}
    rate, others = statistics.median(reading) / 1e9, loudest(noise)
    print(f"{header.n_layer} layers of {header.n_embed}, {threads} threads")
    print(f"reading {rate:.1f} GB/s; others had up to {others:.1%} of the CPUs' time")
    print("tokens/s (how many times as many as the other program)")
    print(f"{'':<24}" + "".join(f"{work:>20}" for work in tokens))
    for name, results in figures.items():
        cells = []
        for work, count in tokens.items():
            if work not in results[0] or work not in figures[theirs][0]:
                cells.append("")
                continue
            rate = statistics.median([count / result[work] for result in results])
            pairs = zip(figures[theirs], results, strict=True)
            ratio = statistics.median([other[work] / own[work] for other, own in pairs])
            cells.append(f"{rate:.1f}" + ("" if name == theirs else f" ({ratio:.2f} x)"))
        print(f"{name:<24}" + "".join(f"{cell:>20}" for cell in cells))


def gguf_size(path: Path) -> tuple[int, int]:
    """What a token reads, the embedding left out; and weights in matrices of layers."""
    from gguf import GGUFReader

    tensors = [t for t in GGUFReader(path).tensors if t.name != "token_embd.weight"]
    layers = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in layers)


@main.command("llama", help="llama.cpp's own benchmark; shares of the limits are what compares.")
@click.argument("program", metavar="LLAMA_BENCH")
@click.argument("theirs", type=click.Path(exists=True, path_type=Path))
@click.argument("ours", type=click.Path(exists=True, path_type=Path))
@n_threads
@n_rounds
@load_options
def llama(
    program: str, theirs: Path, ours: Path, threads: int, rounds: int, options: dict[str, Any]
) -> None:
    n_bytes, layer_weights = gguf_size(theirs)
    model = Ours(ours, threads, options)
    command = [program, "-m", str(theirs), "-t", str(threads), "-r", "1", "-o", "json"]
    command += ["-p", str(LLAMA_PROMPT), "-n", str(LLAMA_TOKENS)]
    rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def row(size: int, seconds: float, reading: float, rate: float) -> tuple[float, ...]:
        rates = size / seconds / 1e9, reading / 1e9, reading_share(size, seconds, reading)
        return seconds * 1e3, *rates, rate / 1e9

    noise = []
    for _ in range(rounds):
        result = model.round()
        noise.append(result.noise)
        answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        reading = model.limits(n_bytes).read  # beside theirs: it decodes last
        prompt, decode = (run["avg_ts"] for run in answer)
        rate = operations(layer_weights, 1, 1 / prompt)
        rows[theirs.stem].append(row(n_bytes, 1 / decode, reading, rate))
        rate = operations(model.layer_weights, PROMPT, result.prompt)
        rows[ours.stem].append(row(model.n_bytes, result.decode, result.limits.read, rate))
    print(f"{threads} threads; others had up to {loudest(noise):.1%} of the CPUs")
    print(f"{'':<24}{'ms/token':>12}{'GB/s':>12}{'limit':>12}{'share':>12}{'prompt GOP/s':>14}")
    for name, results in rows.items():
        ms, reads, limit, share, rate = map(statistics.median, zip(*results, strict=True))
        print(f"{name:<24}{ms:>12.2f}{reads:>12.1f}{limit:>12.1f}{share:>12.1%}{rate:>14.1f}")
    pairs = list(zip(*rows.values(), strict=True))
    shares = statistics.median([own[3] / other[3] for other, own in pairs])
    rates = statistics.median([own[4] / other[4] for other, own in pairs])
    print(
        f"ours over theirs: {shares:.2f} x the share of reading, {rates:.2f} x the GOP/s of prompts"
    )


if __name__ == "__main__":
    main()
