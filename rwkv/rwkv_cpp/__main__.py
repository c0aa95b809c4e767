"""`python -m rwkv_cpp` is the command `rwkv`."""

from .cli import main

main()
