"""Convert a checkpoint to a model file: the same as `rwkv convert`."""

from rwkv_cpp.cli import main_as

if __name__ == "__main__":
    main_as("convert")
