"""Continue a text: `rwkv generate`, with the model as its first argument."""

from rwkv_cpp.cli import main_as

PROMPT = "# rwkv-ggml\n\nThis library runs RWKV language models on a CPU. To begin with,"

if __name__ == "__main__":
    main_as("generate", "model_path", "prompt?", prompt=PROMPT)
