"""Measure how well a model predicts a text: `rwkv perplexity`, with the arguments of 2023."""

from rwkv_cpp.cli import main_as

if __name__ == "__main__":
    main_as("perplexity", "model_path", "text", "skip", "limit?=-1")
