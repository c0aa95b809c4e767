"""The exceptions of this package.

    RWKVError
    ├── RWKVLibraryNotFound   the C library is nowhere it is looked for, or cannot be loaded
    ├── RWKVFileError         a model, checkpoint, state or other file is not what it must be
    ├── ForeignState          a state belongs to another model
    ├── ModelNotFound         what was named is no model on this machine
    ├── DownloadFailed        a model could not be fetched, or what came is not it
    ├── VocabularyNotFound    a tokenizer's vocabulary file is nowhere it is looked for
    └── NonFiniteLogits       logits hold NaN or infinity where a token has to be chosen

Wrong arguments raise ValueError or TypeError, a closed model RuntimeError.
"""


class RWKVError(Exception):
    """Anything that this package raises on its own account."""


class RWKVLibraryNotFound(RWKVError):
    """The C library is nowhere it is looked for, or cannot be loaded."""


class RWKVFileError(RWKVError):
    """A model, checkpoint, state, vocabulary or text file is not what it must be."""


class ForeignState(RWKVError):
    """A state belongs to another model."""


class ModelNotFound(RWKVError):
    """What was named is no model on this machine."""


class DownloadFailed(RWKVError):
    """A model could not be fetched, or what came is not it."""


class VocabularyNotFound(RWKVError):
    """A tokenizer's vocabulary file is nowhere it is looked for."""


class NonFiniteLogits(RWKVError):
    """Logits hold NaN or infinity where a token has to be chosen."""


def first_line(error: Exception) -> str:
    """What another package's exception says, for a message of ours; its name if it is silent."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
