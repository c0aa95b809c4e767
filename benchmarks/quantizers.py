"""Judge the quantizers on a model and on the same model with outliers, as large ones have them:

python benchmarks/quantizers.py model.bin training.txt held-out.txt

Importances are measured on 20,000 tokens of the training text, divergence and loss on 4,000 of the
held-out one, in pieces from all over them. Prints the tables of docs/quantization.md.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rwkv_cpp import RWKVModel, RWKVSequence, load_tokenizer
from rwkv_cpp.formats import file_formats
from rwkv_cpp.ggmf import FP32, Header, Writer, read_index, read_tensor
from rwkv_cpp.importance import collect, write_importances
from rwkv_cpp.quantize import quantize_file
from rwkv_cpp.rescale import rescale
from rwkv_cpp.scoring import Mean, compare_logits, independent_blocks, mean
from rwkv_cpp.target_size import quantize_to_size
from rwkv_cpp.texts import read_text

CALIBRATION, HELD_OUT = 20_000, 4_000
PIECES = 20  # of a text, each read from its beginning
OUTLIERS = 0.01  # the share of the rows of ffn.key that become
FACTORS = (8, 16, 32)  # times as long: powers of two, so that the function stays to the bit
MIX = "Q4_1"  # whose bytes a mix of formats gets, too


def write_outliers(source: Path, target: Path) -> None:
    """Scale some rows of ffn.key up and the columns of ffn.value down by the square."""
    header, records = read_index(source)
    random = np.random.default_rng(0)
    scales: dict[str, np.ndarray] = {}
    for record in records:
        if record.key.endswith(".ffn.key.weight"):
            n = record.shape[0]
            scale = np.ones(n, np.float32)
            chosen = random.choice(n, max(round(OUTLIERS * n), 1), replace=False)
            scale[chosen] = random.choice(FACTORS, len(chosen))
            scales[record.key.removesuffix("key.weight")] = scale
    sizes = header.n_vocab, header.n_embed, header.n_layer
    with Writer(target, Header(101, *sizes, FP32)) as writer:
        for record in records:
            array = read_tensor(source, record).astype(np.float32)
            if record.key.endswith(".ffn.key.weight"):
                array *= scales[record.key.removesuffix("key.weight")][:, None]
            elif record.key.endswith(".ffn.value.weight"):
                array /= scales[record.key.removesuffix("value.weight")] ** 2
            writer.write(record.key, FP32, array)


def spread(tokens: Sequence[int], n_tokens: int) -> list[Sequence[int]]:
    """So many tokens in pieces, evenly spread."""
    step, length = len(tokens) // PIECES, n_tokens // PIECES
    return [tokens[start : start + length] for start in range(0, step * PIECES, step)]


class Judge:
    """A model on some texts, which other files are compared with."""

    def __init__(self, path: Path, texts: Sequence[Sequence[int]]) -> None:
        self._texts = texts
        self._targets = np.concatenate([np.asarray(text[1:], np.intp) for text in texts])
        lengths = [len(text) - 1 for text in texts]
        self._blocks = independent_blocks(np.repeat(np.arange(len(texts)), lengths))
        self._base = self._logits(path)

    def _logits(self, path: Path) -> np.ndarray:
        """Those that predict a token of a text."""
        with RWKVModel(None, path) as model:
            results = model.eval_batch(RWKVSequence(t, n_logits=len(t)) for t in self._texts)
        return np.concatenate([result.logits[:-1] for result in results])

    def compare(self, path: Path) -> tuple[Mean, Mean]:
        """The KL divergence and the change of the loss, in nats per token."""
        found = compare_logits(self._logits(path), self._base, self._targets)
        loss = mean(found.loss - found.base_loss, self._blocks)
        return mean(found.divergence, self._blocks), loss


def judge_version(
    folder: Path, model: Path, training: Sequence[Sequence[int]], judge: Judge
) -> None:
    """Print the tables of one version of a model."""
    level = folder / "level.bin"
    rescale(model, level)
    importances = {path: measure_importances(folder, path, training) for path in (model, level)}
    columns = {
        "rtn": (model, "rtn"),
        "mse": (model, "mse"),
        "importance": (model, "importance"),
        "rescaled, rtn": (level, "rtn"),
        "rescaled, importance": (level, "importance"),
    }
    target = folder / "quantized.bin"
    rows = []
    for name in file_formats()[2:]:
        cells = []
        for path, method in columns.values():
            given = importances[path] if method == "importance" else None
            quantize_file(path, target, name, method=method, importances=given)
            cells.append(judge.compare(target))
        rows.append((name, target.stat().st_size, cells))
    show("KL divergence", columns, rows, lambda cell: f"{cell[0].value:.3g}")
    show("change of the loss", columns, rows, lambda cell: f"{cell[1].value:+.5f}")
    kl, loss = np.array([[[m.error for m in cell] for cell in cells] for *_, cells in rows]).T.max(
        axis=(1, 2)
    )
    print(f"± at most {kl:.2g} (divergence) and {loss:.2g} (loss), one standard error.\n")


def judge_mix(folder: Path, model: Path, training: Sequence[Sequence[int]], judge: Judge) -> None:
    """Print what a mix of formats loses in the bytes of MIX."""
    uniform, target = folder / "uniform.bin", folder / "mix.bin"
    quantize_file(model, uniform, MIX)
    importances = measure_importances(folder, model, training)
    mix = quantize_to_size(model, target, uniform.stat().st_size, importances=importances)
    divergence, change = judge.compare(target)
    print(
        f"A mix of formats in {mix.measured.n_bytes:,} bytes, as "
        f"{MIX} takes them, of the model as it is, by importance: divergence "
        f"{divergence.value:.3g}, change of the loss {change.value:+.5f}."
    )


def measure_importances(folder: Path, model: Path, training: Sequence[Sequence[int]]) -> Path:
    target = folder / f"{model.stem}.importances"
    with RWKVModel(None, model) as loaded:
        write_importances(target, loaded, collect(loaded, training))
    return target


def show(
    what: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, int, list[tuple[Mean, Mean]]]],
    cell_text: Callable[[tuple[Mean, Mean]], str],
) -> None:
    print(f"| {what} | bytes | {' | '.join(columns)} |\n|---|---:|{'---:|' * len(columns)}")
    for name, size, cells in rows:
        print(f"| {name} | {size:,} | {' | '.join(map(cell_text, cells))} |")
    print(flush=True)


def main(model: Path, training: Path, held_out: Path) -> None:
    header, _ = read_index(model)
    tokenizer = load_tokenizer(header.n_vocab, None, model)
    texts = [tokenizer.encode(read_text(path)) for path in (training, held_out)]
    calibration, test = spread(texts[0], CALIBRATION), spread(texts[1], HELD_OUT)
    judge = Judge(model, test)
    with tempfile.TemporaryDirectory(prefix="rwkv-") as name:
        outliers = Path(name, "outliers.bin")
        write_outliers(model, outliers)
        for title, path in (("as it is", model), ("with outliers", outliers)):
            print(f"### {model.stem}, {title}\n")
            judge_version(Path(name), path, calibration, judge)
        judge_mix(Path(name), model, calibration, judge)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
