"""RWKV language models on a CPU.

    from rwkv_cpp import RWKV

    model = RWKV("model.bin")
    print(model.generate("Once upon a time", max_tokens=100))

Names are imported when they are first used, so that `import rwkv_cpp` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversation import Conversation
    from .embedding import Normalizer
    from .errors import (
        DownloadFailed,
        ForeignState,
        ModelNotFound,
        NonFiniteLogits,
        RWKVError,
        RWKVFileError,
        RWKVLibraryNotFound,
        VocabularyNotFound,
    )
    from .generation import Completion, Stream
    from .library import RWKVSharedLibrary, load_rwkv_shared_library
    from .model import Importances, RWKVModel, RWKVResult, RWKVSequence
    from .models import find_model
    from .prefix_cache import PrefixCache
    from .rwkv import RWKV
    from .sampling import (
        Sampler,
        Sampling,
        TokenLogprob,
        log_softmax,
        sample_logits,
        top_logprobs,
    )
    from .state import State, StateNotice
    from .tokenizer import load_tokenizer

__version__ = "0.1.0"

# Where each public name lives.
_HOMES = {
    "Completion": "generation",
    "Conversation": "conversation",
    "DownloadFailed": "errors",
    "ForeignState": "errors",
    "Importances": "model",
    "ModelNotFound": "errors",
    "NonFiniteLogits": "errors",
    "Normalizer": "embedding",
    "PrefixCache": "prefix_cache",
    "RWKV": "rwkv",
    "RWKVError": "errors",
    "RWKVFileError": "errors",
    "RWKVLibraryNotFound": "errors",
    "RWKVModel": "model",
    "RWKVResult": "model",
    "RWKVSequence": "model",
    "RWKVSharedLibrary": "library",
    "Sampler": "sampling",
    "Sampling": "sampling",
    "State": "state",
    "StateNotice": "state",
    "Stream": "generation",
    "TokenLogprob": "sampling",
    "VocabularyNotFound": "errors",
    "find_model": "models",
    "load_rwkv_shared_library": "library",
    "load_tokenizer": "tokenizer",
    "log_softmax": "sampling",
    "sample_logits": "sampling",
    "top_logprobs": "sampling",
}

__all__ = [
    "RWKV",
    "Completion",
    "Conversation",
    "DownloadFailed",
    "ForeignState",
    "Importances",
    "ModelNotFound",
    "NonFiniteLogits",
    "Normalizer",
    "PrefixCache",
    "RWKVError",
    "RWKVFileError",
    "RWKVLibraryNotFound",
    "RWKVModel",
    "RWKVResult",
    "RWKVSequence",
    "RWKVSharedLibrary",
    "Sampler",
    "Sampling",
    "State",
    "StateNotice",
    "Stream",
    "TokenLogprob",
    "VocabularyNotFound",
    "find_model",
    "load_rwkv_shared_library",
    "load_tokenizer",
    "log_softmax",
    "sample_logits",
    "top_logprobs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
