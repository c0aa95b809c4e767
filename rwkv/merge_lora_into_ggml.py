"""Merge a LoRA into a model file: the same as `rwkv merge-lora`."""

from rwkv_cpp.cli import main_as

if __name__ == "__main__":
    main_as("merge-lora")
