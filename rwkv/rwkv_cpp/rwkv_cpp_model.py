"""RWKVModel under the module name of rwkv.cpp, whose package is called as ours."""

from .compat.rwkv_cpp.rwkv_cpp_model import RWKVModel as RWKVModel
