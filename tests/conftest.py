"""Puts this folder on the path, so that tests import the references (`reference.…`) by name, and
lets Ctrl-C work."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# A shell starts its background jobs with Ctrl-C ignored, which our children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
