"""The World tokenizer under the module name of rwkv.cpp, whose package is called as ours."""

from .compat.rwkv_cpp.rwkv_world_tokenizer import (
    get_world_tokenizer_v20230424 as get_world_tokenizer_v20230424,
)
