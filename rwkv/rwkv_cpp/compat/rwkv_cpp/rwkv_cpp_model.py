"""RWKVModel with the arguments of rwkv.cpp's."""

from __future__ import annotations

import warnings
from typing import Any

from ... import model
from ...library import FilePath, RWKVSharedLibrary


class RWKVModel(model.RWKVModel):
    """gpu_layer_count: how many layers would go to a GPU, of which there is none here."""

    def __init__(
        self,
        shared_library: RWKVSharedLibrary | None,
        model_path: FilePath,
        thread_count: int | None = None,
        gpu_layer_count: int = 0,
        *,
        gpu_layers_count: int = 0,
        **options: Any,
    ) -> None:
        """gpu_layers_count: the same as gpu_layer_count. options: as of `rwkv_cpp.RWKVModel`."""
        if gpu_layer_count or gpu_layers_count:
            warnings.warn("gpu_layer_count: all layers are on the CPU", stacklevel=2)
        super().__init__(shared_library, model_path, thread_count, **options)
