"""RWKVModel under the module name of 2023."""

from rwkv_cpp.model import RWKVModel as RWKVModel
