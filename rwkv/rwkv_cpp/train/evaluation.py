"""The loss on the held-out part, also by the position in a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..token_data import TokenData
from .data import IGNORED
from .learner import Learner


@dataclass(frozen=True)
class HeldOutLoss:
    """Sums over all texts: losses in nats and how many, by the number of tokens read before."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.sums.sum() / self.counts.sum())

    def by_position(self) -> dict[int, float]:
        """Mean losses where 1, 2, 3 … 4, 5 … 8 tokens were read, and so on: keyed by the last."""
        result = {}
        start, stop = 0, 1
        while start < len(self.sums):
            end = min(stop, len(self.sums))
            result[end] = float(self.sums[start:end].sum() / self.counts[start:end].sum())
            start, stop = stop, 2 * stop
        return result


@torch.no_grad()
def held_out_loss(
    learner: Learner, data: TokenData, sequence: int, *, rows: int, pieces: int
) -> HeldOutLoss:
    """The loss over `data`, each document read from its beginning in windows of `sequence`.

    The state is carried from window to window, except where that is not what is learned.
    rows:   how many texts are read at once.
    pieces: in about as many the data is cut, where documents do not do it already.
    """
    device = next(learner.parameters()).device
    learner.eval()
    parts = _cut(data, -(-data.tokens.size // pieces))
    sums, counts = np.zeros(parts[0][1] - parts[0][0]), np.zeros(parts[0][1] - parts[0][0])
    for first in range(0, len(parts), rows):
        starts, stops = np.array(parts[first : first + rows]).T
        past = learner.past(len(starts))
        for offset in range(0, int(stops[0] - starts[0]), sequence):
            n = int((stops - starts > offset).sum())  # the shorter texts, the last ones, have ended
            places = starts[:n, None] + offset + np.arange(sequence + 1)
            read = places[:, :-1] < stops[:n, None]
            tokens = data.tokens[np.minimum(places, data.tokens.size - 1)].astype(np.int64)
            targets = np.where(read, tokens[:, 1:], IGNORED)
            # Only the one text that is left may be cut short: what it leaves is not used.
            width = int(read.sum(1).max())
            x = torch.from_numpy(tokens[:, :width]).to(device)
            y = torch.from_numpy(targets[:, :width]).to(device)
            past = [type(layer)(*(part[:n] for part in layer)) for layer in past]
            logits, past = learner(x, past if learner.carries_past else learner.past(n))
            losses = F.cross_entropy(
                logits.float().transpose(1, 2), y, ignore_index=IGNORED, reduction="none"
            )
            sums[offset : offset + width] += losses.sum(0, dtype=torch.float64).cpu().numpy()
            counts[offset : offset + width] += read[:, :width].sum(0)
    learner.train()
    return HeldOutLoss(sums, counts)


def _cut(data: TokenData, longest: int) -> list[tuple[int, int]]:
    """(start, stop) of the tokens that are read, the longest texts first; a document's last token
    is nothing but a target."""
    stops = np.append(data.documents[1:], data.tokens.size) - 1
    parts = [
        (first, min(first + longest, int(stop)))
        for start, stop in zip(data.documents, stops, strict=True)
        for first in range(int(start), int(stop), longest)
    ]
    return sorted(parts, key=lambda part: part[0] - part[1])
