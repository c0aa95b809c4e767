"""RWKV-4 and 4a in float64: the model as its paper has it, and the place to start reading.

RWKV is a recurrent network. A token changes a small state and yields one number per word of the
vocabulary, its logit; nothing else is remembered. A model is a chain of layers, each of two parts
that read the running vector x and add to it:

    time mixing      looks back: a weighted average over all tokens so far, in constant memory
    channel mixing   thinks: a feed-forward network

The state of a layer is five vectors of n_embed numbers, one row each:

    0  ffn_xx   what channel mixing saw at the previous token
    1  att_xx   what time mixing saw at the previous token
    2  aa       the sum of all values so far, weighted
    3  bb       the sum of their weights
    4  pp       the exponent that aa and bb are scaled by: the true sums are aa * exp(pp), ...

RWKV-4a adds one tiny attention, after one of the layers: a token meets every token up to itself, by
a product of its query with that one's key, and takes as much of its embedding (times a matrix).
There is no softmax, so the sum over all tokens can be had from one matrix M, the sum of the outer
products of keys and values, which whoever reads on starts from.

`weights` holds the tensors under the names of the released checkpoints, matrices as (rows, cols) =
(out, in), and time_decay as model files store it: negative, the exponent lost per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Weights = Mapping[str, np.ndarray]

FFN_XX, ATT_XX, AA, BB, PP = range(5)


def initial_state(n_layer: int, n_embed: int) -> np.ndarray:
    """The state before the first token: nothing seen, and weights of exp(-1e30) = 0."""
    state = np.zeros((n_layer, 5, n_embed))
    state[:, PP] = -1e30
    return state


def forward(
    weights: Weights, tokens: Sequence[int], state: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The logits (tokens, n_vocab) after every token, and the state after the last.

    `state`, (n_layer, 5, n_embed) or flat, is where to go on from; None is the beginning of a text.
    It is not changed. That of RWKV-4a is flat, and M, (n_tiny, n_embed), follows the layers.
    """
    n_layer = sum(key.endswith(".ln1.weight") for key in weights)
    n_vocab, n_embed = weights["emb.weight"].shape
    tiny = TinyAttention(weights)
    if state is None:
        state = initial_state(n_layer, n_embed)
    else:
        state, tiny.before = np.split(np.array(state, np.float64).ravel(), [n_layer * 5 * n_embed])
    state = state.reshape(n_layer, 5, n_embed)

    logits = np.empty((len(tokens), n_vocab))
    for t, token in enumerate(tokens):
        x = weights["emb.weight"][token]
        x = layer_norm(x, weights, "blocks.0.ln0")
        for i in range(n_layer):
            x = x + time_mixing(layer_norm(x, weights, f"blocks.{i}.ln1"), weights, i, state[i])
            x = x + channel_mixing(layer_norm(x, weights, f"blocks.{i}.ln2"), weights, i, state[i])
            if i == tiny.layer:
                x = x + tiny(x, weights["emb.weight"][token])
        logits[t] = weights["head.weight"] @ layer_norm(x, weights, "ln_out")
    if tiny.layer is not None:
        return logits, np.concatenate([state.ravel(), tiny.after().ravel()])
    return logits, state


def time_mixing(x: np.ndarray, weights: Weights, i: int, state: np.ndarray) -> np.ndarray:
    """What layer i remembers. Updates the rows att_xx, aa, bb and pp of its state."""
    att = f"blocks.{i}.att"
    r, k, v = (
        weights[f"{att}.{matrix}.weight"] @ shift(x, state[ATT_XX], weights[f"{att}.time_mix_{z}"])
        for z, matrix in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    state[ATT_XX] = x
    memory = wkv(k, v, weights[f"{att}.time_first"], weights[f"{att}.time_decay"], state)
    return weights[f"{att}.output.weight"] @ (sigmoid(r) * memory)


def wkv(
    k: np.ndarray, v: np.ndarray, first: np.ndarray, decay: np.ndarray, state: np.ndarray
) -> np.ndarray:
    """The average of all values so far, each channel for itself. Updates aa, bb and pp.

    A value of s tokens ago weighs exp(k + (s - 1) * decay), the newest exp(k + first). All weights
    are kept relative to the largest, exp(q), since exp(k) alone would overflow.
    """
    aa, bb, pp = state[AA], state[BB], state[PP]

    q = np.maximum(pp, k + first)
    old, new = np.exp(pp - q), np.exp(k + first - q)
    average = (old * aa + new * v) / (old * bb + new)

    q = np.maximum(pp + decay, k)
    old, new = np.exp(pp + decay - q), np.exp(k - q)
    state[AA], state[BB], state[PP] = old * aa + new * v, old * bb + new, q
    return average


def channel_mixing(x: np.ndarray, weights: Weights, i: int, state: np.ndarray) -> np.ndarray:
    """What layer i makes of it. Updates the row ffn_xx of its state."""
    ffn = f"blocks.{i}.ffn"
    xr = shift(x, state[FFN_XX], weights[f"{ffn}.time_mix_r"])
    xk = shift(x, state[FFN_XX], weights[f"{ffn}.time_mix_k"])
    state[FFN_XX] = x
    k = np.maximum(weights[f"{ffn}.key.weight"] @ xk, 0) ** 2
    gate = sigmoid(weights[f"{ffn}.receptance.weight"] @ xr)
    return gate * (weights[f"{ffn}.value.weight"] @ k)


class TinyAttention:
    """RWKV-4a's attention as it is trained: each token meets each one before it. `layer` is the one
    that has it, None in RWKV-4. `before` is M of the tokens that were read before these."""

    def __init__(self, weights: Weights) -> None:
        names = [key.removesuffix(".tiny_q.weight") for key in weights if ".tiny_q." in key]
        self.weights, self.block = weights, names[0] if names else ""
        self.layer = int(self.block.split(".")[1]) if names else None
        self.before = np.zeros(0)
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def __call__(self, x: np.ndarray, embedding: np.ndarray) -> np.ndarray:
        z = layer_norm(x, self.weights, f"{self.block}.tiny_ln")
        query = self.weights[f"{self.block}.tiny_q.weight"] @ z
        self.keys.append(self.weights[f"{self.block}.tiny_k.weight"] @ z)
        self.values.append(self.weights[f"{self.block}.tiny_v.weight"] @ embedding)
        products = np.array([query @ key for key in self.keys])
        return (products @ np.array(self.values) + query @ self._before()) / np.sqrt(len(query))

    def after(self) -> np.ndarray:
        """M, (n_tiny, n_embed): the sum of the outer products of all keys and values."""
        return self._before() + np.array(self.keys).T @ np.array(self.values)

    def _before(self) -> np.ndarray:
        shape = self.weights[f"{self.block}.tiny_q.weight"].shape
        return self.before.reshape(shape) if self.before.size else np.zeros(shape)


def layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    normal = (x - np.mean(x)) / np.sqrt(np.var(x) + 1e-5)
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def shift(x: np.ndarray, previous: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """Token shift: channel by channel a mixture of this token and the one before."""
    return x * mix + previous * (1 - mix)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
