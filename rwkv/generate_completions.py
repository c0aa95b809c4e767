"""Continue a text three times: `rwkv generate`, with the model as its first argument."""

from rwkv_cpp.cli import main_as

PROMPT = "# rwkv-ggml\n\nThis library runs RWKV language models on a CPU. To begin with,"

if __name__ == "__main__":
    sampling = {"temperature": 0.8, "top_p": 0.5}
    main_as("generate", "model_path", "prompt?", prompt=PROMPT, count=3, max_tokens=100, **sampling)
