"""`prwkv.rwkvrnnmodel`: a model that keeps one context, as token ids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ...errors import ForeignState
from ...models import SUFFIXES
from ...rwkv import RWKV
from ...sampling import Sampler, Sampling
from ...state import State
from ..opening import model_file
from ..repeatable import fresh_seed

STATE_SUFFIX = ".safetensors"


class InputsNeeded(ValueError):
    """There is nothing to go on from: neither a context nor tokens."""


class FilePathError(ValueError):
    """There is no path to save to."""


class IncompatibleCompatibleModel(ForeignState):
    """A context belongs to another model."""


class RWKV_RNN_Model:
    """What `RWKVRNN4NeoForCausalLM.from_pretrained` returns.

    state: the context, None before `warmup_with_context`. current_context: all tokens read and
    written since. Calls that choose a device or a type of numbers warn: the format is the file's.
    """

    def __init__(self, rwkv: RWKV, file_name: str, context_length: int | None = None) -> None:
        self.rwkv = rwkv
        self.number_of_layers = rwkv.n_layer
        self.embedding_dim = rwkv.n_embed
        self.context_length = context_length
        self.file_name = file_name
        self.eos_token_id = 0
        self.padd_token_id = 1
        self.state: State | None = None
        self.current_context: list[int] = []
        self.should_update = False
        self.return_full_context = False

    # ---- The context -----------------------------------------------------------------------------

    def warmup_with_context(self, context: Iterable[int]) -> None:
        """Read tokens: they become the context, in the place of the one before."""
        tokens = list(context)
        self.state = self.rwkv.read(tokens)
        self.current_context = tokens

    def clear_memory(self) -> None:
        """Forget the context."""
        self.state = None
        self.current_context = []

    def save_context(self, save_path_and_name: str | Path, context_decoded: str = "") -> None:
        """Write the context to save_path_and_name.safetensors.

        context_decoded is not needed: the file holds the tokens, and so their text.
        """
        if save_path_and_name is None:
            raise FilePathError("save_context: a path is needed")
        if self.state is None:
            raise InputsNeeded("save_context: there is no context, call warmup_with_context first")
        self.state.save(f"{os.fspath(save_path_and_name)}{STATE_SUFFIX}")

    def load_context(
        self, load_path: str | Path, ignore_model_check: bool = False
    ) -> tuple[str, str]:
        """Take the context of load_path.safetensors; return its text and this model's name.

        ignore_model_check: also that of another model of the same sizes. Raises
        IncompatibleCompatibleModel for that of another model, RWKVFileError for no context.
        """
        state = State.load(f"{os.fspath(load_path)}{STATE_SUFFIX}")
        if ignore_model_check:
            state.fingerprint = None
        try:
            self.state = state.for_model(self.rwkv)
        except ForeignState as error:
            raise IncompatibleCompatibleModel(str(error)) from None
        self.current_context = list(state.tokens)
        return self.rwkv.tokenizer.decode(state.tokens), self.file_name

    # ---- Text ------------------------------------------------------------------------------------

    def update_state_after_generation(self, flag: bool) -> None:
        """Whether the next `generate` goes on after this one's tokens, or from the same context."""
        self.should_update = flag

    def should_return_full_context(self, flag: bool = True) -> None:
        """Whether `generate` returns all of `current_context`."""
        self.return_full_context = flag

    def generate(
        self,
        input_ids: Iterable[int],
        streaming_callback: Callable[[int], object] | None = None,
        bad_words_ids: Iterable[int] = (),
        force_words_ids: Iterable[int] = (),
        max_length: int = 128,
        temperature: float = 0.85,
        top_p: float = 0.9,
        top_k: int = 20,
        stop_on_eos: bool = False,
        repetition_penalty: float = 0,
    ) -> list[int]:
        """Read tokens after the context and go on; return both, the tokens read and those written.

        streaming_callback: gets each of them as it comes. max_length: how many are written.
        bad_words_ids: are not written. force_words_ids: are written first. 0 switches top_p, top_k
        and repetition_penalty off. stop_on_eos: end with the end-of-text token.
        Raises InputsNeeded if there is neither a context nor a token.
        """
        sampling = Sampling(
            temperature=temperature,
            top_p=top_p or 1.0,
            top_k=top_k,
            repetition_penalty=repetition_penalty or 1.0,
            banned_tokens=tuple(bad_words_ids),
            forced_tokens=tuple(force_words_ids),
            seed=fresh_seed(),
        )
        sampler = Sampler(sampling, self.rwkv.n_vocab)
        tokens, state = list(input_ids), self.state
        if tokens:
            state = self.rwkv.read(tokens, state)
        elif state is None or state.logits is None:
            raise InputsNeeded("generate: pass input_ids, or call warmup_with_context first")
        told = streaming_callback or (lambda token: None)
        for token in tokens:
            told(token)
        for _ in range(max_length):
            token = sampler.sample(np.asarray(state.logits), len(state.tokens))
            sampler.accept(token)
            tokens.append(token)
            told(token)
            if stop_on_eos and token == self.eos_token_id:
                break
            state = self.rwkv.read([token], state)
        if self.should_update:
            self.state = state
        self.current_context = [*self.current_context, *tokens]
        return list(self.current_context) if self.return_full_context else tokens

    # ---- What a CPU does not choose --------------------------------------------------------------

    def half(self, mode: str = "fp16") -> None:
        self._stays("half")

    def full(self, mode: str = "fp32") -> None:
        self._stays("full")

    def cuda(self) -> None:
        self._stays("cuda")

    def cpu(self) -> None:
        self._stays("cpu")

    def _stays(self, call: str) -> None:
        warnings.warn(
            f"{call}() has no effect: the model is on the CPU, in the format of its file"
            f" {self.rwkv.path}",
            stacklevel=3,
        )


class RWKVRNN4NeoForCausalLM:
    """Makes models."""

    @staticmethod
    def from_pretrained(
        file_path_or_name: str | os.PathLike[str],
        number_of_layers: int | None = None,
        embedding_dimension: int | None = None,
        context_length: int | None = None,
        cache_folder_path: str | os.PathLike[str] | None = None,
    ) -> RWKV_RNN_Model:
        """Load a model.

        file_path_or_name: a checkpoint or a model file, with or without its suffix; or a name such
        as RWKV-4-430M, which is downloaded and kept.
        number_of_layers, embedding_dimension: not needed; a warning if the file says otherwise.
        cache_folder_path: not used, with a warning; RWKV_HOME says where models are kept.
        """
        name = Path(file_path_or_name).name
        for suffix in SUFFIXES:
            name = name.removesuffix(suffix)
        model = RWKV_RNN_Model(RWKV(model_file(file_path_or_name)), name, context_length)
        said = {
            "number_of_layers": (number_of_layers, model.number_of_layers),
            "embedding_dimension": (embedding_dimension, model.embedding_dim),
        }
        for name, (value, true) in said.items():
            if value not in (None, true):
                warnings.warn(f"{name} {value}: the file has {true}", stacklevel=2)
        if cache_folder_path is not None:
            warnings.warn(
                "cache_folder_path is not used: models are kept where RWKV_HOME says", stacklevel=2
            )
        return model
