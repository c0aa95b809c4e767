"""Quantize a model file: the same as `rwkv quantize`."""

from rwkv_cpp.cli import main_as

if __name__ == "__main__":
    main_as("quantize")
