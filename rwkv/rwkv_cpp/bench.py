"""The `rwkv bench` command: how fast a model runs here, and how fast this machine could run it.

Decoding reads every weight once per token, so its limit is the rate at which the machine reads a
buffer of that size. A prompt or a batch uses each weight many times, so its limit is the rate of
multiplying. All of that is measured together in rounds: the limits, then the model's work. A round
in which something else kept the CPUs busy is done again. Figures are medians over the rounds; a
share is the median of each round's share.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import numpy as np
from tqdm import tqdm

from .atomic import replacing
from .convert import BLOCK_TENSORS, TENSORS
from .ggmf import DTYPES, FP16, FP32, Header, Writer, read_index
from .info import megabytes
from .library import (
    MAX_THREADS,
    Limits,
    Memory,
    RWKVSharedLibrary,
    load_rwkv_shared_library,
)
from .load_options import Command, load_options, model_option
from .model import RWKVModel, RWKVSequence, embedded_model
from .quantize import quantize_file
from .registry import SIZES

T = TypeVar("T")
Report = Callable[[str], object]
"""Called with what is being done."""

PROMPT = 256  # tokens
BATCHES = (1, 2, 4, 8, 16)  # sequences
REPETITIONS = 5  # rounds that count …
LOADINGS = 3  # … and loadings …
_PATIENCE = 2  # … out of at most so many times as many
QUIET = 0.01  # the share of the CPUs' time that others may take
_SECONDS = 0.3  # that a rate is measured for at least
_SAMPLE = 1 << 30  # bytes that show the memory's rate, unless the cache is large
_N_VOCAB = 50277  # of the released models

# ---- This machine --------------------------------------------------------------------------------


class Noise(NamedTuple):
    """Shares of the time of this process's CPUs that others had: guests of the same host (steal),
    and programs on this system."""

    steal: float
    others: float


class Watch:
    """Sees what others do with this process's CPUs from now on."""

    def __init__(self) -> None:
        self._start = _cpu_seconds()

    def read(self) -> Noise | None:
        """None where the system does not say; Linux does."""
        now = _cpu_seconds()
        if self._start is None or now is None:
            return None
        n_cpus = len(os.sched_getaffinity(0))
        tick = n_cpus / os.sysconf("SC_CLK_TCK")  # what counting in ticks may be off by
        steal, busy, own, wall = (b - a for a, b in zip(self._start, now, strict=True))
        time_of_all = n_cpus * wall
        return Noise(max(steal - tick, 0) / time_of_all, max(busy - own - tick, 0) / time_of_all)


def _cpu_seconds() -> tuple[float, float, float, float] | None:
    """Seconds so far: stolen from this process's CPUs, that they were busy, that this process used
    them, and of the clock."""
    try:
        lines = Path("/proc/stat").read_text("ascii").splitlines()
        cpus = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    steal = busy = 0
    for name, *fields in map(str.split, lines):
        if name in cpus:
            user, nice, system, _idle, _iowait, irq, soft_irq, stolen, *_ = map(int, fields)
            steal += stolen
            busy += user + nice + system + irq + soft_irq
    ticks = os.sysconf("SC_CLK_TCK")
    return steal / ticks, busy / ticks, time.process_time(), time.perf_counter()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_size() -> int | None:
    """Bytes of the last-level cache; None where the system does not say. Linux does."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level = int((index / "level").read_text("ascii"))
        sizes[level] = int((index / "size").read_text("ascii").strip().removesuffix("K")) << 10
    return sizes[max(sizes)] if sizes else None


def _resident() -> int | None:
    """Bytes of memory that this process has, mapped files included."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Machine:
    """cache: bytes of the last-level cache, if known. sample: bytes of a buffer that no cache
    holds. limits: by number of threads, with the reading rate of the memory and of that cache."""

    cpu: str
    kernels: str
    cache: int | None
    sample: int
    limits: dict[int, tuple[Limits, Limits | None]]

    def limit_name(self, n_bytes: int) -> str:
        """Where a buffer of that size is read from."""
        return "LLC" if self.cache and n_bytes <= self.cache else "DRAM"


def measure_machine(
    library: RWKVSharedLibrary, threads: Sequence[int | None], report: Report
) -> Machine:
    """threads: numbers of them; None stands for the physical cores."""
    cache = cache_size()
    sample = max(_SAMPLE, 4 * (cache or 0))
    limits = {}
    for number in threads:
        report(f"limits of {number or 'all'} threads")

        def measure(number: int | None = number) -> tuple[Limits, Limits | None, Noise | None]:
            watch = Watch()
            memory = library.rwkv_measure(number, sample)
            last = library.rwkv_measure(number, cache // 2) if cache else None
            return memory, last, watch.read()

        memory, last, _ = repeat(measure, lambda result: [result[2]], 1)[0]
        limits[memory.n_threads] = memory, last
    kernels = library.rwkv_get_system_info_string().rpartition("ISA=")[2]
    return Machine(cpu_name(), kernels, cache, sample, limits)


# ---- Figures -------------------------------------------------------------------------------------


def repeat(
    measure: Callable[[], T], noise_of: Callable[[T], Iterable[Noise | None]], count: int
) -> list[T]:
    """Measure until `count` results were quiet, or patience ends. The quietest come first."""
    results: list[tuple[float, T]] = []
    while sum(level <= QUIET for level, _ in results) < count and len(results) < _PATIENCE * count:
        result = measure()
        results.append((loudest(noise_of(result)), result))
    results.sort(key=lambda pair: pair[0])
    return [result for _, result in results]


def loudest(noise: Iterable[Noise | None]) -> float:
    return max((max(n) for n in noise if n is not None), default=0.0)


def reading_share(n_bytes: int, seconds: float, limit: float) -> float:
    """Reading so much in that time, as a share of `limit` bytes per second."""
    return n_bytes / seconds / limit


def operations(n_weights: int, n_tokens: int, seconds: float) -> float:
    """Operations per second when each weight meets each token: a product and a sum."""
    return 2 * n_weights * n_tokens / seconds


class Round(NamedTuple):
    """limits: `read` is for a buffer as large as what a token reads. Seconds: `decode` for a token,
    `prompt` for PROMPT of them, `batch[n]` for one token of each of n sequences."""

    limits: Limits
    decode: float
    prompt: float
    batch: dict[int, float]
    noise: Noise | None = None


class Loading(NamedTuple):
    """Seconds until a model is loaded, and then until its first logits. growth: bytes that the
    process had grown by when it had read a prompt; None: not known, or not read."""

    load: float
    first_token: float
    growth: int | None
    noise: Noise | None = None


@dataclass(frozen=True)
class Result:
    """All about one model. layer_weights: in matrices, without embedding and head. Of the loadings
    the first LOADINGS count, of the rounds (one dict per repetition, keyed by the number of
    threads) the first REPETITIONS."""

    name: str
    memory: Memory
    layer_weights: int
    limit_name: str
    loadings: Sequence[Loading]
    rounds: Sequence[dict[int, Round]]

    def figures(self) -> dict[str, Any]:
        """For `--json`: bytes, seconds, rates per second, shares of 1."""
        loadings = self.loadings[:LOADINGS]
        growth = max((loading.growth or 0 for loading in self.loadings), default=0)
        return {
            "name": self.name,
            "file_bytes": self.memory.file,
            "token_bytes": self.memory.token,
            "layer_weights": self.layer_weights,
            "load": {
                "seconds": statistics.median(loading.load for loading in loadings),
                "first_token_seconds": statistics.median(
                    loading.first_token for loading in loadings
                ),
                "noise": loudest(loading.noise for loading in loadings),
            },
            "memory": {"estimate": self.memory.total, "growth": growth or None},
            "threads": {str(n): self._speed(n) for n in self.rounds[0]},
        }

    def _speed(self, n_threads: int) -> dict[str, Any]:
        rounds = [rounds[n_threads] for rounds in self.rounds[:REPETITIONS]]
        n_bytes, n_weights = self.memory.token, self.layer_weights

        def median(figure: Callable[[Round], float]) -> float:
            return statistics.median(map(figure, rounds))

        def rate(r: Round) -> float:
            return operations(n_weights, PROMPT, r.prompt)

        def batch_rate(n: int, r: Round) -> float:
            return n / r.batch[n]

        def batch_ratio(n: int, r: Round) -> float:
            return n * r.batch[1] / r.batch[n]

        return {
            "rounds": len(rounds),
            "rounds_discarded": len(self.rounds) - len(rounds),
            "noise": loudest(r.noise for r in rounds),
            "limits": {
                "read": median(lambda r: r.limits.read),
                "read_from": self.limit_name,
                "fp32": median(lambda r: r.limits.fp32),
                "int8": median(lambda r: r.limits.int8),
            },
            "decode": {
                "seconds": median(lambda r: r.decode),
                "bytes": median(lambda r: n_bytes / r.decode),
                "share": median(lambda r: reading_share(n_bytes, r.decode, r.limits.read)),
            },
            "prompt": {
                "tokens": median(lambda r: PROMPT / r.prompt),
                "operations": median(rate),
                "share_of_fp32": median(lambda r: rate(r) / r.limits.fp32),
                "share_of_int8": median(lambda r: rate(r) / r.limits.int8),
            },
            "batch": {
                str(n): {
                    "tokens": median(functools.partial(batch_rate, n)),
                    "ratio": median(functools.partial(batch_ratio, n)),
                }
                for n in BATCHES
            },
        }


# ---- Measuring a model ---------------------------------------------------------------------------


def measure_model(
    library: RWKVSharedLibrary,
    machine: Machine,
    name: str,
    path: Path,
    report: Report,
    **options: Any,
) -> Result:
    """Measure the model at `path` with the numbers of threads that `machine` was measured with.

    options: as for RWKVModel.
    """
    memory = library.rwkv_estimate(path, **options)
    most = max(machine.limits)
    report(f"{name}: loading")
    loadings = measure_loading(library, path, most, options)
    numbers = itertools.count(1)
    with RWKVModel(library, path, most, **options) as model:
        contexts = {n: model.clone(n) for n in machine.limits}
        sample = min(memory.token, machine.sample)

        def measure() -> dict[int, Round]:
            report(f"{name}: round {next(numbers)}")
            return {n: measure_round(library, contexts[n], n, sample) for n in contexts}

        rounds = repeat(measure, lambda result: [r.noise for r in result.values()], REPETITIONS)
        for context in contexts.values():
            context.free()
    _, records = read_index(path)
    layer_weights = sum(
        record.shape[0] * record.shape[1]
        for record in records
        if len(record.shape) == 2 and record.key.startswith("blocks.")
    )
    limit_name = machine.limit_name(memory.token)
    return Result(name, memory, layer_weights, limit_name, loadings, rounds)


def measure_round(
    library: RWKVSharedLibrary, model: RWKVModel, n_threads: int, sample: int
) -> Round:
    """sample: bytes of the buffer that the reading rate is measured with."""
    watch = Watch()
    limits = library.rwkv_measure(n_threads, sample)
    tokens = random_tokens(model.n_vocab)
    states = np.tile(model.init_state(), (max(BATCHES), 1))
    logits = np.empty((max(BATCHES), 1, model.n_vocab), np.float32)

    def decode() -> None:
        model.eval(next(tokens), states[0], states[0], logits[0, 0])

    def prompt() -> None:
        text = list(itertools.islice(tokens, PROMPT))
        model.eval_sequence(text, states[0], states[0], logits[0, 0])

    def batch(n: int) -> None:
        model.eval_batch(
            RWKVSequence([next(tokens)], state, state, row)
            for state, row in zip(states[:n], logits[:n], strict=True)
        )

    decode()
    batch(max(BATCHES))  # makes room for so many
    return Round(
        limits,
        seconds_of(decode),
        seconds_of(prompt),
        {n: seconds_of(functools.partial(batch, n)) for n in BATCHES},
        watch.read(),
    )


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    count, taken = 0, 0.0
    while taken < _SECONDS:
        call()
        count += 1
        taken = time.perf_counter() - began
    return taken / count


def random_tokens(n_vocab: int) -> Iterator[int]:
    random = np.random.default_rng(0)
    while True:
        yield from random.integers(n_vocab, size=1024).tolist()


def measure_loading(
    library: RWKVSharedLibrary, path: Path, n_threads: int, options: dict[str, Any]
) -> list[Loading]:
    """Load the model again and again, each time in a new process, from the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    with_prompt = iter([True])  # the first time only: it is slow
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, _leave_interrupts_to_parent, maxtasksperchild=1) as pool:

        def measure() -> Loading:
            arguments = library.path, path, n_threads, next(with_prompt, False), options
            return pool.apply(load_once, arguments)

        return repeat(measure, lambda loading: [loading.noise], LOADINGS)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_once(
    library_path: Path, path: Path, n_threads: int, with_prompt: bool, options: dict[str, Any]
) -> Loading:
    library = load_rwkv_shared_library(library_path)
    before = _resident()
    watch = Watch()
    began = time.perf_counter()
    with RWKVModel(library, path, n_threads, **options) as model:
        loaded = time.perf_counter()
        _, state = model.eval(0, None)
        evaluated = time.perf_counter()
        noise = watch.read()
        growth = None
        if with_prompt and before is not None:
            model.eval_sequence([0] * PROMPT, state)
            growth = (_resident() or 0) - before
    return Loading(loaded - began, evaluated - loaded, growth, noise)


# ---- Models to measure ---------------------------------------------------------------------------


@contextmanager
def _temporary_folder(n_bytes: int) -> Iterator[Path]:
    """A folder with room for so many bytes, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="rwkv-bench-") as folder:
        free = shutil.disk_usage(folder).free
        if free < n_bytes:
            reason = (
                f"{megabytes(n_bytes)} are needed for models, {megabytes(free)} are free "
                "(the environment variable TMPDIR names another folder)"
            )
            raise OSError(errno.ENOSPC, reason, folder)
        yield Path(folder)


def shape_models(
    library: RWKVSharedLibrary, shape: str, formats: Sequence[str], report: Report
) -> Iterator[tuple[str, Path]]:
    """Models of a released size with random weights, as (name, path); each file is there until the
    next one is asked for."""
    n_layer, n_embed = SIZES[shape]
    sizes = [library.rwkv_estimate_shape(_N_VOCAB, n_embed, n_layer, name).file for name in formats]
    with _temporary_folder(max(sizes)) as folder:
        for name in formats:
            report(f"{shape} {name}: writing random weights")
            path = folder / "model.bin"
            write_random_model(path, name, _N_VOCAB, n_embed, n_layer, library)
            yield f"{shape} {name}", path
            path.unlink()


def file_models(
    library: RWKVSharedLibrary, path: Path, formats: Sequence[str], report: Report
) -> Iterator[tuple[str, Path]]:
    """The model at `path` itself, or quantized to these formats."""
    header, _ = read_index(path)
    own_format = library.rwkv_get_format_name(header.data_type) or ""
    with _temporary_folder(path.stat().st_size if formats else 0) as folder:
        for name in formats or (own_format,):
            if name == own_format:
                yield f"{path.stem} {name}", path
                continue
            report(f"{path.name}: quantizing to {name}")
            target = folder / "model.bin"
            quantize_file(path, target, name, library=library)
            yield f"{path.stem} {name}", target


def write_random_model(
    path: Path,
    format_name: str,
    n_vocab: int,
    n_embed: int,
    n_layer: int,
    library: RWKVSharedLibrary | None = None,
) -> None:
    """Write an RWKV-4 of this size: weights that stay finite, in a file that is no model of
    anything. Matrices are in this format; embedding and head in FP16, or FP32 as all else."""
    library = library or load_rwkv_shared_library()
    names = [str(library.rwkv_get_format_name(number)) for number in range(10)]
    data_type = names.index(format_name)
    version = 101 if library.rwkv_get_row_size(101, data_type, 32) else 100
    table_type = FP32 if data_type == FP32 else FP16
    random = np.random.default_rng(0)
    # Random weights are dear, and so is quantizing: a matrix starts somewhere in these and repeats
    # them.
    pools = {number: _random_blocks(library, names[number]) for number in {data_type, table_type}}
    sizes = {"V": n_vocab, "C": n_embed, "F": 4 * n_embed}
    vectors = {
        "time_decay": -np.exp(np.linspace(-5, 2, n_embed)),
        "time_first": random.normal(0, 0.5, n_embed),
        "time_mix": random.uniform(0, 1, n_embed),
        "weight": np.ones(n_embed),
        "bias": np.zeros(n_embed),
    }
    blocks = {
        f"blocks.{i}.{key}": dims for i in range(n_layer) for key, dims in BLOCK_TENSORS.items()
    }
    with Writer(path, Header(version, n_vocab, n_embed, n_layer, data_type)) as writer:
        for key, dims in (TENSORS | blocks).items():
            if len(dims) == 1:
                kind = next(kind for kind in vectors if kind in key)
                writer.write(key, FP32, vectors[kind].astype(np.float32))
                continue
            number = table_type if key in ("emb.weight", "head.weight") else data_type
            shape = sizes[dims[0]], sizes[dims[1]]
            size = shape[0] * library.rwkv_get_row_size(version, number, shape[1])
            block = library.rwkv_get_row_size(version, number, 32)
            start = block * int(random.integers(len(pools[number]) // block))
            writer.write_pieces(key, number, shape, _repeated(pools[number], start, size))


def _random_blocks(library: RWKVSharedLibrary, format_name: str) -> bytes:
    """A million random weights in this format, or more."""
    for data_type, dtype in DTYPES.items():
        if library.rwkv_get_format_name(data_type) == format_name:
            weights = np.random.default_rng(1).standard_normal(1 << 22, np.float32)
            return bytes((0.02 * weights).astype(dtype).tobytes())
    with tempfile.TemporaryDirectory(prefix="rwkv-bench-") as folder:  # C quantizes whole models
        plain, quantized = Path(folder) / "plain.bin", Path(folder) / "quantized.bin"
        write_random_model(plain, "FP16", 1, 512, 1, library)
        quantize_file(plain, quantized, format_name, library=library)
        _, records = read_index(quantized)
        record = next(record for record in records if record.key == "blocks.0.ffn.key.weight")
        return quantized.read_bytes()[record.offset : record.offset + record.nbytes]


def _repeated(data: bytes, start: int, size: int) -> Iterator[memoryview]:
    """So many bytes from `start` on, over and over."""
    while size > 0:
        piece = memoryview(data)[start : start + size]
        yield piece
        size -= len(piece)
        start = 0


# ---- The command ---------------------------------------------------------------------------------


def _threads(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int | None]:
    if value is None:
        return [None]
    try:
        numbers = [int(word) for word in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 1,2") from None
    if not all(1 <= number <= MAX_THREADS for number in numbers):
        raise click.BadParameter(f"{value!r}: expected numbers of 1 to {MAX_THREADS}")
    return list(dict.fromkeys(numbers))


def _drawable(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'rwkv-ggml[plot]'")
    return value


def plot_option(text: str) -> Callable[[Command], Command]:
    """Adds --plot to a command, which gets `picture`, a path or None."""
    return click.option(
        "--plot", "picture", type=click.Path(path_type=Path), callback=_drawable, help=text
    )


@click.command()
@functools.partial(model_option, quantize=False)
@click.option("--shape", type=click.Choice(list(SIZES)), help="A released size, random weights.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="FORMAT",
    help="Quantize the model to this one first; may be given several times.  [default: as the file "
    "is; Q4_0 for a shape]",
)
@click.option(
    "--threads",
    callback=_threads,
    metavar="N,…",
    help="Numbers of threads.  [default: physical cores]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plot_option("Also draw speeds and limits to this PNG file.")
@load_options
def command(
    model_path: Path | None,
    shape: str | None,
    formats: tuple[str, ...],
    threads: list[int | None],
    as_json: bool,
    picture: Path | None,
    options: dict[str, Any],
) -> None:
    """Measure how fast a model runs, beside this machine's limits.

    Reading rates are shares of the rate at which memory or cache (LLC) can be read, multiplying
    rates shares of the peak in registers; all are measured in the same rounds. Rounds in which
    other programs were at work are repeated. Models of a released size, with random weights, are
    written to a temporary folder (TMPDIR) and removed.

    \b
    rwkv bench -m model.bin
    rwkv bench --shape 1B5 --format FP16 --format Q4_0 --threads 1,2
    """
    if model_path is not None and shape is not None:
        raise click.UsageError("--model and --shape exclude each other")
    library = load_rwkv_shared_library()
    formats = tuple(dict.fromkeys(name.upper() for name in formats))
    with tqdm(bar_format="{desc} ({elapsed})", disable=None, leave=False) as bar:
        report = bar.set_description_str
        machine = measure_machine(library, threads, report)
        if shape is not None:
            models = shape_models(library, shape, formats or ("Q4_0",), report)
        else:
            models = file_models(library, model_path or embedded_model(), formats, report)
        results = [
            measure_model(library, machine, *model, report, **options).figures() for model in models
        ]
    figures = _machine_figures(machine) | {"options": options, "models": results}
    if picture is not None:
        draw_roofline(picture, figures)
    click.echo(json.dumps(figures) if as_json else _table(figures))


def _machine_figures(machine: Machine) -> dict[str, Any]:
    return {
        "cpu": machine.cpu,
        "kernels": machine.kernels,
        "llc_bytes": machine.cache,
        "noise_known": Watch().read() is not None,
        "limits": {
            str(n): {
                "dram": memory.read,
                "llc": cache.read if cache else None,
                "fp32": memory.fp32,
                "int8": memory.int8,
            }
            for n, (memory, cache) in machine.limits.items()
        },
    }


def _table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    options = [f"{name} {value}" for name, value in figures["options"].items() if value]
    lines = [", ".join([figures["cpu"], f"{figures['kernels']} kernels", *options])]

    def heading(*columns: str) -> None:
        lines.extend(["", f"{columns[0]:<24}" + "".join(f"{column:>13}" for column in columns[1:])])

    def row(name: str, *columns: str) -> None:
        lines.append(f"{name:<24}" + "".join(f"{column:>13}" for column in columns))

    heading("limits", "DRAM", "LLC", "FP32", "int8")
    for n, limits in figures["limits"].items():
        row(
            f"{n} thr.",
            giga(limits["dram"], "GB/s"),
            giga(limits["llc"], "GB/s"),
            giga(limits["fp32"], "GOP/s"),
            giga(limits["int8"], "GOP/s"),
        )
    heading("model", "a token reads", "load", "first token", "memory", "estimate")
    for model in figures["models"]:
        growth = model["memory"]["growth"]
        row(
            model["name"],
            megabytes(model["token_bytes"]),
            f"{model['load']['seconds']:.3f} s",
            f"{1000 * model['load']['first_token_seconds']:.1f} ms",
            megabytes(growth) if growth else "not known",
            megabytes(model["memory"]["estimate"]),
        )
    runs = [
        (f"{model['name']}, {n} thr.", speed)
        for model in figures["models"]
        for n, speed in model["threads"].items()
    ]
    heading("decode", "ms/token", "reads", "limit", "of", "share")
    for name, speed in runs:
        decode, limits = speed["decode"], speed["limits"]
        row(
            name,
            f"{1000 * decode['seconds']:.3f}",
            giga(decode["bytes"], "GB/s"),
            giga(limits["read"], "GB/s"),
            limits["read_from"],
            f"{decode['share']:.1%}",
        )
    heading(f"prompt of {PROMPT}", "tokens/s", "rate", "of FP32", "of int8")
    for name, speed in runs:
        prompt = speed["prompt"]
        row(
            name,
            f"{prompt['tokens']:.1f}",
            giga(prompt["operations"], "GOP/s"),
            f"{prompt['share_of_fp32']:.1%}",
            f"{prompt['share_of_int8']:.1%}",
        )
    heading("batch, tokens/s", *map(str, BATCHES), f"{BATCHES[-2]} over 1")
    for name, speed in runs:
        batch = speed["batch"]
        ratio = f"{batch[str(BATCHES[-2])]['ratio']:.2f} x"
        row(name, *(f"{batch[str(n)]['tokens']:.1f}" for n in BATCHES), ratio)
    lines.append("")
    if not figures["noise_known"]:
        lines.append("what other programs did meanwhile is not known on this system")
    for name, speed in runs:
        if speed["noise"] > QUIET:
            lines.append(
                f"{name}: disturbed, others had up to {speed['noise']:.1%} of the CPUs' time"
            )
    count = sum(len(model["threads"]) for model in figures["models"])
    discarded = sum(speed["rounds_discarded"] for _, speed in runs)
    lines.append(f"medians of {REPETITIONS} rounds; {discarded} rounds of {count} runs discarded")
    return "\n".join(lines)


def giga(rate: float | None, unit: str) -> str:
    return "not known" if rate is None else f"{rate / 1e9:.1f} {unit}"


def draw_roofline(path: Path, figures: dict[str, Any]) -> None:
    """Write a PNG: what the machine can do with so many operations per byte read, and what decoding
    (left), batches and prompts (right) of each model do."""
    from matplotlib.figure import Figure

    n_threads, limits = max(figures["limits"].items(), key=lambda item: int(item[0]))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    intensity = np.geomspace(0.5, 2000, 200)
    for name, kind, style in (("DRAM", "dram", "-"), ("LLC", "llc", "--")):
        if limits[kind]:
            roof = np.minimum(limits[kind] * intensity, limits["int8"]) / 1e9
            axes.plot(intensity, roof, style, color="black", linewidth=0.8, label=f"reads {name}")
    axes.axhline(limits["fp32"] / 1e9, color="gray", linewidth=0.8, label="FP32 peak")
    axes.axhline(limits["int8"] / 1e9, color="gray", linewidth=0.8, ls="--", label="int8 peak")
    for model in figures["models"]:
        speed = model["threads"][n_threads]
        # Weights in layers only: the head reads bytes, but is no part of a prompt's work.
        n_operations = 2 * model["layer_weights"]
        rates = {n: speed["batch"][str(n)]["tokens"] for n in BATCHES}
        rates |= {PROMPT: speed["prompt"]["tokens"]}
        axes.plot(
            [n * n_operations / model["token_bytes"] for n in rates],
            [n_operations * tokens / 1e9 for tokens in rates.values()],
            marker="o",
            markersize=4,
            label=model["name"],
        )
    axes.set(
        title=f"{figures['cpu']}, {n_threads} threads",
        xlabel="operations per byte of weights",
        ylabel="GOP/s",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
