"""Sampling under the module name of rwkv.cpp."""

from rwkv_cpp.sampling import sample_logits as sample_logits
