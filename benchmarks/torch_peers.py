"""A Python package that runs RWKV-4 on torch, with random weights; peers.py starts it.

For every line on standard input it measures one round and prints seconds as JSON: of decoding a
token, of a prompt, of one token for each sequence of a batch.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rwkv_cpp.bench import seconds_of

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Works = dict[str, Callable[[], object]]
"""What to measure; a package that has no batches leaves them out."""


def random_weights(n_vocab: int, n_embed: int, n_layer: int) -> dict[str, torch.Tensor]:
    """As in a checkpoint of RWKV-4."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return 0.02 * torch.randn(rows, columns)

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(n_embed), f"{name}.bias": torch.zeros(n_embed)}

    weights = {"emb.weight": matrix(n_vocab, n_embed), "head.weight": matrix(n_vocab, n_embed)}
    weights |= norm("blocks.0.ln0") | norm("ln_out")
    for i in range(n_layer):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        weights |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2")
        weights[f"{att}.time_decay"] = -torch.exp(torch.linspace(-5, 2, n_embed))
        weights[f"{att}.time_first"] = 0.5 * torch.randn(n_embed)
        for name in "kvr":
            weights[f"{att}.time_mix_{name}"] = torch.rand(1, 1, n_embed)
        for name in "kr":
            weights[f"{ffn}.time_mix_{name}"] = torch.rand(1, 1, n_embed)
        for name in ("key", "value", "receptance", "output"):
            weights[f"{att}.{name}.weight"] = matrix(n_embed, n_embed)
        weights[f"{ffn}.key.weight"] = matrix(4 * n_embed, n_embed)
        weights[f"{ffn}.receptance.weight"] = matrix(n_embed, n_embed)
        weights[f"{ffn}.value.weight"] = matrix(n_embed, 4 * n_embed)
    return weights


def rwkv(arguments: argparse.Namespace) -> Works:
    """The package rwkv."""
    os.environ["RWKV_JIT_ON"], os.environ["RWKV_CUDA_ON"] = "1", "0"
    from rwkv.model import RWKV

    weights = random_weights(arguments.vocab, arguments.embed, arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pth")
        torch.save({name: tensor.bfloat16() for name, tensor in weights.items()}, path)
        model = RWKV(path, f"cpu {arguments.type}", verbose=False)
    _, state = model.forward([0], None)
    return {
        "decode": lambda: model.forward([1], state),
        "prompt": lambda: model.forward(list(range(arguments.prompt)), None),
    }


def transformers(arguments: argparse.Namespace) -> Works:
    """The package transformers; logits of all tokens of the prompt, it offers no
    other."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.embed,
        num_hidden_layers=arguments.layers,
    )
    model = RwkvForCausalLM(config).to(TYPES[arguments.type]).eval()

    def start(n_tokens: int, n_sequences: int) -> Callable[[], object]:
        tokens = torch.arange(n_tokens).repeat(n_sequences, 1)
        return lambda: model(input_ids=tokens, use_cache=True)

    def go_on(n_sequences: int) -> Callable[[], object]:
        state = start(1, n_sequences)().state
        tokens = torch.ones(n_sequences, 1, dtype=torch.int64)
        return lambda: model(input_ids=tokens, state=state, use_cache=True)

    return {
        "decode": go_on(1),
        "prompt": start(arguments.prompt, 1),
        "batch": go_on(arguments.batch),
    }


def main() -> None:
    packages = {"rwkv": rwkv, "transformers": transformers}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", choices=packages)
    parser.add_argument("type", choices=TYPES)
    for name in ("vocab", "embed", "layers", "prompt", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # packages print what they do
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        works = packages[arguments.package](arguments)
        for work in works.values():  # warm up
            work()
        for _ in sys.stdin:
            print(
                json.dumps({k: seconds_of(v) for k, v in works.items()}), file=answers, flush=True
            )


if __name__ == "__main__":
    main()
