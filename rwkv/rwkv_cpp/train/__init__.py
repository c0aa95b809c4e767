"""`rwkv train`: a small RWKV-4 from a text file. Only here does the package need torch.

command.py   the options, the progress shown, Ctrl-C
loop.py      batches, optimizer, held-out loss, checkpoints
network.py   the model
curve.py     the picture of the losses
"""

from .command import command

__all__ = ["command"]
