"""RWKVModel under the module name of rwkv.cpp."""

from rwkv_cpp.rwkv_cpp_model import RWKVModel as RWKVModel
