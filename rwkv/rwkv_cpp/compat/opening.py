"""Which file the old homes mean by a path, a name or an address."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint import is_checkpoint
from ..errors import ModelNotFound
from ..models import file_at, find_model
from ..pull import pull
from ..registry import parse_source


def model_file(model: str | os.PathLike[str] | None, format: str | None = None) -> Path:
    """The model file of what `find_model` understands; what can be downloaded is, as it was there.

    format: what a checkpoint is converted to; a model file is taken as it is.
    """
    if model is None:
        return find_model()
    text = os.fspath(model).strip()
    file = file_at(text)
    if file is not None and not is_checkpoint(file):
        return file
    try:
        return find_model(text, format)
    except ModelNotFound:
        if parse_source(text) is None:
            raise
        return pull(text, format)
