"""lm-eval's own command line, which knows `--model rwkv-ggml` here."""

from lm_eval.__main__ import cli_evaluate

from . import RWKVLM

__all__ = ["RWKVLM"]  # by its import it is registered

if __name__ == "__main__":
    cli_evaluate()
