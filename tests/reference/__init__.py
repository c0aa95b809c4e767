"""The oracle: what the core must compute, written in numpy and sharing no line with it.

Start with `rwkv_v4.py` (the model, as the paper has it), then `quants.py` (how weights are packed)
and `canonical.py` (the model again, to the last bit).
"""
