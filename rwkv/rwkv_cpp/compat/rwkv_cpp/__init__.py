"""rwkv.cpp's modules: those of 2023, which lie in `rwkv/`, and those of its package `rwkv_cpp`."""
