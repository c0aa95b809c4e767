"""Tokenizers under the module name of rwkv.cpp."""

from rwkv_cpp.compat.rwkv_cpp.tokenizer_util import add_tokenizer_argument as add_tokenizer_argument
from rwkv_cpp.compat.rwkv_cpp.tokenizer_util import get_tokenizer as get_tokenizer
