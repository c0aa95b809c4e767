"""Write a model of llama's architecture with random weights, for llama.cpp, in FP16:

python benchmarks/random_gguf.py model.gguf

As many layers and as wide as RWKV-4 1B5: 24 layers of 2048. Needs the package gguf.
"""

import sys

import numpy as np
from gguf import GGUFWriter

N_LAYER, N_EMBED, N_FFN, N_HEAD, N_VOCAB, N_CONTEXT = 24, 2048, 5632, 32, 32000, 2048


def main(path: str) -> None:
    random = np.random.default_rng(0)
    pool = (0.02 * random.standard_normal(1 << 22, np.float32)).astype(np.float16)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(N_EMBED)
    writer.add_feed_forward_length(N_FFN)
    writer.add_head_count(N_HEAD)
    writer.add_rope_dimension_count(N_EMBED // N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1)  # mostly FP16

    def matrix(name: str, rows: int, columns: int) -> None:
        start = int(random.integers(len(pool)))
        writer.add_tensor(f"{name}.weight", np.resize(np.roll(pool, -start), (rows, columns)))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBED, np.float32))

    matrix("token_embd", N_VOCAB, N_EMBED)
    for i in range(N_LAYER):
        norm(f"blk.{i}.attn_norm")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{name}", N_EMBED, N_EMBED)
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.ffn_gate", N_FFN, N_EMBED)
        matrix(f"blk.{i}.ffn_up", N_FFN, N_EMBED)
        matrix(f"blk.{i}.ffn_down", N_EMBED, N_FFN)
    norm("output_norm")
    matrix("output", N_VOCAB, N_EMBED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
