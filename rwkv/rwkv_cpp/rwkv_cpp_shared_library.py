"""The C library under the module name of rwkv.cpp, whose package is called as ours."""

from .library import RWKVSharedLibrary as RWKVSharedLibrary
from .library import load_rwkv_shared_library as load_rwkv_shared_library
