"""The loss curve of a run as a picture."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from ..atomic import replacing


def draw_curve(path: Path, train: Mapping[int, float], held_out: Mapping[int, float]) -> None:
    """Write a PNG of both losses (nats per byte, keyed by step) to `path`."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(train), list(train.values()), linewidth=0.6, alpha=0.6, label="training")
    axes.plot(list(held_out), list(held_out.values()), marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    highest = max(held_out.values())
    axes.set_ylim(0.95 * min(*train.values(), *held_out.values()), 1.1 * highest)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
