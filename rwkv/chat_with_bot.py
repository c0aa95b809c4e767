"""Chat with a model: `rwkv chat`, with the model as its first argument."""

from rwkv_cpp.cli import main_as

if __name__ == "__main__":
    main_as("chat", "model_path")
