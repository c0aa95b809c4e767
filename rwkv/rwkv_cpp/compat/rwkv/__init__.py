"""ChatRWKV's pip package: `model.RWKV`, `utils.PIPELINE`, `rwkv_tokenizer.TRIE_TOKENIZER`."""
