"""Puts this folder on the path, so that tests import the references (`reference.…`) by name, and
lets Ctrl-C work."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# A shell starts its background jobs with Ctrl-C ignored, which our children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread_of_torch() -> Iterator[None]:
    """What is this small only waits for more threads, for minutes where others compute as well."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
