"""The C library under the module name of 2023."""

from rwkv_cpp.library import RWKVSharedLibrary as RWKVSharedLibrary
from rwkv_cpp.library import load_rwkv_shared_library as load_rwkv_shared_library
