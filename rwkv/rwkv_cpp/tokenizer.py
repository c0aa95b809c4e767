"""Text to tokens and back, and where the vocabulary files come from.

Three tokenizers, told apart by the number of tokens that a model knows:

    256     bytes   every byte is a token; no file
    50277   20B     byte-level BPE of the Pile and Raven models, `20B_tokenizer.json`
    65536   World   greedy longest match over bytes, `rwkv_vocab_v20230424.txt`

Text never becomes a control token: what looks like `<|endoftext|>` is encoded as the characters
that it is written with. In 20B and World, token 0 ends a text or document and decodes to nothing.
"""

import abc
import ast
import codecs
import contextlib
import hashlib
import importlib.util
import operator
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .atomic import replacing
from .errors import RWKVFileError, VocabularyNotFound, first_line

MAX_VOCABULARY_BYTES = 64 << 20  # the published files have 1 and 2.5 MB
MAX_LINE_CHARACTERS = 4096  # the longest line of the published World file has 140

NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # 20B has no tokens for these bytes

PACKAGES = ("rwkv", "pyrwkv-tokenizer")  # both keep World's file beside their __init__.py
DOWNLOAD_TIMEOUT_SECONDS = 10.0  # to connect, and between two pieces


class Tokenizer(abc.ABC):
    """A table of tokens, and a rule to cut text into them.

    n_vocab is the model's, and may exceed the highest id: some models have unused ids. Given as
    None, it is that of the ids.
    """

    def __init__(self, n_vocab: int | None, table: dict[int, bytes]) -> None:
        highest = max(table)
        if n_vocab is None:
            n_vocab = highest + 1
        elif highest >= n_vocab:
            raise RWKVFileError(
                f"holds ids up to {highest}, the model only {n_vocab} tokens:"
                " pass the vocabulary that the model was trained with"
            )
        self.n_vocab = n_vocab
        self._table = table

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises ValueError, with the position, for a lone surrogate."""

    @abc.abstractmethod
    def encode_bytes(self, data: bytes) -> list[int]:
        """The tokens of a text in UTF-8. ValueError where bytes can't be encoded as they are."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some tokens, with U+FFFD where their bytes are not UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of some tokens. Raises ValueError for an id that no token has."""
        pieces = []
        for token in tokens:
            piece = self.token_bytes(token)
            if piece is None:
                raise ValueError(f"token {token} is not in the vocabulary")
            pieces.append(piece)
        return b"".join(pieces)

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of one token: none at all for a control token, None for an unused id.

        Raises ValueError for an id that is not in 0..n_vocab-1.
        """
        if isinstance(token, bool):
            raise TypeError(f"token: expected an integer, found {token}")
        index = operator.index(token)
        if not 0 <= index < self.n_vocab:
            raise ValueError(f"token {token} is not in 0..{self.n_vocab - 1}")
        return self._table.get(index)


class ByteTokenizer(Tokenizer):
    """256 tokens: the bytes."""

    def __init__(self) -> None:
        super().__init__(256, {value: bytes([value]) for value in range(256)})

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_bytes(self, data: bytes) -> list[int]:
        return list(memoryview(data))


class WorldTokenizer(Tokenizer):
    """Greedy longest match: at each place the longest token that the text goes on with."""

    def __init__(self, n_vocab: int | None, tokens: list[bytes]) -> None:
        """tokens: those of ids 1, 2, …; all different, none empty, every single byte among them."""
        super().__init__(n_vocab, dict(enumerate([b"", *tokens])))
        # The trie as one dict: every beginning of a token leads to the longest token that it begins
        # with itself, as id and length. So a walk ends where the text leaves the dict.
        self._longest: dict[bytes, tuple[int, int]] = {}
        ids = {token: index for index, token in enumerate(tokens, start=1)}
        for token in sorted(tokens, key=len):
            for end in range(1, len(token)):
                start = token[:end]
                if start not in self._longest:
                    self._longest[start] = self._longest[start[:-1]]
            self._longest[token] = ids[token], len(token)

    def encode(self, text: str) -> list[int]:
        return self.encode_bytes(_utf8(text))

    def encode_bytes(self, data: bytes) -> list[int]:
        data = bytes(memoryview(data))
        longest = self._longest.get
        tokens: list[int] = []
        append = tokens.append
        start, end = 0, len(data)
        while start < end:
            # Most walks get past two bytes, and those that do not are settled by one.
            match = longest(data[start : start + 2]) or self._longest[data[start : start + 1]]
            stop = start + 3
            while stop <= end and (longer := longest(data[start:stop])):
                match = longer
                stop += 1
            append(match[0])
            start += match[1]
        return tokens


class BPETokenizer(Tokenizer):
    """Byte-level BPE from a file of the `tokenizers` package, made for 20B.

    The text is brought to NFC first, as the models' training text was: decoding gives that.
    """

    def __init__(self, n_vocab: int | None, definition: bytes) -> None:
        """definition: the content of the JSON file. Raises RWKVFileError if it is not one."""
        import tokenizers

        try:
            self._bpe = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package's own: an Exception, or a panic, which is none
            raise RWKVFileError(f"not a tokenizer's file: {error}") from None
        if not isinstance(self._bpe.decoder, tokenizers.decoders.ByteLevel):
            raise RWKVFileError("not the file of a byte-level BPE tokenizer, as 20B is")
        self._bpe.encode_special_tokens = True  # as the characters that they are written with
        self._bpe.no_truncation()
        self._bpe.no_padding()

        ids = self._bpe.get_vocab()
        byte_of = _byte_level_alphabet()
        for character, value in byte_of.items():
            if character not in ids and value not in NEVER_IN_UTF8:  # its text would be dropped
                raise RWKVFileError(f"no token for the byte 0x{value:02x}")
        table = {}
        for token, index in ids.items():
            try:
                table[index] = bytes(byte_of[character] for character in token)
            except KeyError:  # added tokens are written as they are, runs of spaces here
                table[index] = token.encode()
        for index, added in self._bpe.get_added_tokens_decoder().items():
            if added.special:
                table[index] = b""
        super().__init__(n_vocab, table)

    def encode(self, text: str) -> list[int]:
        _utf8(text)  # for the position of a lone surrogate in the message
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_bytes(self, data: bytes) -> list[int]:
        return self.encode(bytes(memoryview(data)).decode("utf-8"))


class StreamDecoder:
    """Decodes tokens one by one, whole characters at a time.

    All that feed() and flush() return makes up what decode() gives for all tokens at once. An
    unused id, which decode() refuses, becomes U+FFFD: a stream goes on.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes, often none. ValueError as token_bytes()."""
        piece = self._tokenizer.token_bytes(token)
        return self._decoder.decode("\ufffd".encode() if piece is None else piece)

    @property
    def pending(self) -> bool:
        """Whether the tokens so far end inside a character."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """U+FFFD if the tokens ended inside a character. Then a new stream may begin."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def ends_text(tokenizer: Tokenizer, token: int) -> bool:
    """Whether `token` ends a text: token 0 of 20B and World, which has no bytes."""
    return token == 0 and tokenizer.token_bytes(0) == b""


def first_token(tokenizer: Tokenizer) -> int:
    """What a text begins after: token 0 (end of text) where the vocabulary has it, or a newline."""
    return 0 if ends_text(tokenizer, 0) else tokenizer.encode("\n")[0]


def load_tokenizer(
    n_vocab: int,
    path: str | Path | None = None,
    model_path: str | Path | None = None,
    download: bool = True,
) -> Tokenizer:
    """The tokenizer of a model with n_vocab tokens.

    A given path decides by itself: a JSON file is a BPE tokenizer's, any other a World vocabulary,
    and n_vocab need only be large enough. Otherwise the file that n_vocab asks for is looked for by
    its name: beside the model, in `vocabulary_folder()`, in an installed package `rwkv` or
    `pyrwkv-tokenizer`, and at last on the Hugging Face hub, from where it goes into that folder.
    A file found by its name must be the published one.

    Raises RWKVFileError for a file that is missing, damaged, not the published one
    or with more tokens than n_vocab, VocabularyNotFound if nothing was found.
    """
    if path is not None:
        return _parse(_read(Path(path)), n_vocab, f"'{path}'")
    if n_vocab == 256:
        return ByteTokenizer()
    for vocabulary in PUBLISHED:
        if vocabulary.n_vocab == n_vocab:
            content, source = _find(vocabulary, model_path, download)
            return _parse(content, n_vocab, source)
    known = ", ".join(str(vocabulary.n_vocab) for vocabulary in PUBLISHED)
    raise VocabularyNotFound(
        f"no tokenizer is known for {n_vocab} tokens (only for 256, {known}):"
        " pass the path of the vocabulary file"
    )


def tokenizer_named(name: str) -> Tokenizer:
    """The tokenizer for a text that no model is given with: bytes, 20B or world, in any case, or
    the path of a vocabulary file, for as many tokens as that has.

    Raises ValueError for an unknown name, and as `load_tokenizer` does.
    """
    n_vocab = {"bytes": 256, "20b": 50277, "world": 65536}.get(name.lower())
    if n_vocab is not None:
        return load_tokenizer(n_vocab)
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"unknown tokenizer '{name}' (choose bytes, 20B, world or the path of a file)"
        )
    return _parse(_read(path), None, f"'{path}'")


def vocabulary_folder() -> Path:
    """`$RWKV_HOME`, by default the user's cache folder; it need not exist."""
    if home := os.environ.get("RWKV_HOME"):
        return Path(home)
    import platformdirs

    return platformdirs.user_cache_path("rwkv-ggml", appauthor=False)


def keep_vocabularies(folder: Path) -> None:
    """Copy the published vocabularies of a folder to `vocabulary_folder()`, where models find them
    that do not lie beside them. A copy that fails is left out."""
    for vocabulary in PUBLISHED:
        target = vocabulary_folder() / vocabulary.name
        with contextlib.suppress(OSError, RWKVFileError):
            content = b"" if target.exists() else _read(folder / vocabulary.name)
            if _is_published(content, vocabulary):
                _keep(vocabulary.name, content)


def _keep(name: str, content: bytes) -> None:
    vocabulary_folder().mkdir(parents=True, exist_ok=True)
    with replacing(vocabulary_folder() / name) as file:
        file.write(content)


@dataclass(frozen=True)
class PublishedVocabulary:
    """A vocabulary file as its authors published it, and who carries copies of it."""

    n_vocab: int
    name: str
    sha256: str  # with line ends of one character
    sources: tuple[tuple[str, str], ...]  # hub repositories and their types, in order


PUBLISHED = (
    PublishedVocabulary(
        50277,
        "20B_tokenizer.json",
        "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade",
        (("BlinkDL/Raven-RWKV-7B", "space"),),
    ),
    PublishedVocabulary(
        65536,
        "rwkv_vocab_v20230424.txt",
        "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89",
        (("RWKV/v5-Eagle-7B-HF", "model"), ("RWKV/rwkv-5-world-169m", "model")),
    ),
)


def _find(
    vocabulary: PublishedVocabulary, model_path: str | Path | None, download: bool
) -> tuple[bytes, str]:
    """The content of a published vocabulary, and where it was found."""
    tried = []
    for folder in _folders(model_path):
        path = folder / vocabulary.name
        if path.is_file():
            content = _read(path)
            if not _is_published(content, vocabulary):
                raise RWKVFileError(
                    f"'{path}' is not the published vocabulary of that name (damaged, or edited?):"
                    " remove it, or pass its path to use it nevertheless"
                )
            return content, f"'{path}'"
        tried.append(f"'{path}'")
    tried.append(f"an installed package {' or '.join(PACKAGES)}")
    if not download:
        tried.append("the Hugging Face hub: not asked, since no download is allowed")
    for repository, kind in vocabulary.sources if download else ():
        place = f"{kind} {repository} of the Hugging Face hub"
        try:
            content = _download(vocabulary.name, repository, kind)
        except Exception as error:  # the hub's client lets those of its HTTP package through
            tried.append(f"{place}: {first_line(error)}")
            continue
        if not _is_published(content, vocabulary):
            tried.append(f"{place}: its file is not the published one")
            continue
        # A folder that cannot be written to means a download each time, not no tokenizer.
        with contextlib.suppress(OSError):
            _keep(vocabulary.name, content)
        return content, place
    raise VocabularyNotFound(
        f"a model of {vocabulary.n_vocab} tokens needs the file '{vocabulary.name}',"
        " which was looked for in these places:\n"
        + "".join(f"  {place}\n" for place in tried)
        + "put it into one of these folders, pass its path, or allow the download"
    )


def _folders(model_path: str | Path | None) -> Iterator[Path]:
    """The folders to look for a vocabulary in, the nearest first."""
    if model_path is not None:
        yield Path(model_path).parent
    yield vocabulary_folder()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package.replace("-", "_"))  # runs none of its code
        if spec is not None:
            yield from map(Path, spec.submodule_search_locations or ())


def _is_published(content: bytes, vocabulary: PublishedVocabulary) -> bool:
    # Some copies have gone through Windows; neither file has a carriage return of its own.
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest() == vocabulary.sha256


def _download(name: str, repository: str, kind: str) -> bytes:
    """The content of a file on the hub. Raises whatever the hub's client raises."""
    import huggingface_hub

    # One request of our own through the client's session: its hf_hub_download() would try for half
    # a minute, and log each try, where there is no network.
    url = huggingface_hub.hf_hub_url(repository, name, repo_type=kind)
    response = huggingface_hub.get_session().get(url, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    response.raise_for_status()
    return response.content


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_VOCABULARY_BYTES:
            raise RWKVFileError(
                f"'{path}' has {size} bytes, a vocabulary at most {MAX_VOCABULARY_BYTES}"
            )
        return path.read_bytes()
    except OSError as error:
        raise RWKVFileError(f"vocabulary '{path}': {error.strerror}") from error


def _parse(content: bytes, n_vocab: int | None, source: str) -> Tokenizer:
    try:
        if content.lstrip().startswith(b"{"):
            return BPETokenizer(n_vocab, content)
        return WorldTokenizer(n_vocab, _parse_world(content))
    except RWKVFileError as error:
        raise RWKVFileError(f"vocabulary {source}: {error}") from None


def _parse_world(content: bytes) -> list[bytes]:
    """The tokens of a World vocabulary: line by line an id, counted from 1, a Python literal of
    text or bytes, which may hold spaces, and its length in bytes."""
    try:
        lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise RWKVFileError(f"line {number}: not UTF-8") from None
    if lines[-1] == "":
        lines.pop()

    seen: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        index, _, rest = line.partition(" ")
        literal, _, length = rest.rpartition(" ")
        token = _parse_literal(literal) if len(line) <= MAX_LINE_CHARACTERS else None
        if token is None or not index.isdecimal() or not length.isdecimal():
            raise RWKVFileError(
                f"line {number}: expected an id, a quoted text and its length in bytes,"
                f" found {line[:80]!r}"
            )
        if int(index) != number:
            raise RWKVFileError(f"line {number}: expected id {number}, found {index}")
        if int(length) != len(token) or not token:
            raise RWKVFileError(
                f"line {number}: the token has {len(token)} bytes, its length says {length}"
            )
        if token in seen:
            raise RWKVFileError(f"line {number}: the same token as in line {seen[token]}")
        seen[token] = number
    for value in range(256):
        if bytes([value]) not in seen:
            raise RWKVFileError(f"no token for the byte 0x{value:02x} (truncated file?)")
    return list(seen)


def _parse_literal(literal: str) -> bytes | None:
    """The bytes of a Python literal of text or bytes, None if it is not one."""
    if not literal.startswith(("'", '"', "b'", 'b"')):
        return None
    quote = literal[0]
    if "\\" not in literal and quote != "b" and literal.count(quote) == 2 and literal[-1] == quote:
        return literal[1:-1].encode()  # most lines: seven times as fast
    try:
        value = ast.literal_eval(literal)
        return value if isinstance(value, bytes) else value.encode("utf-8")
    except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError):
        return None


def _utf8(text: str) -> bytes:
    try:
        return str.encode(text, "utf-8")  # TypeError for anything but a str
    except UnicodeEncodeError as error:
        raise ValueError(
            f"lone surrogate U+{ord(text[error.start]):04X} at position {error.start} of the text:"
            " it is no character and has no bytes"
        ) from None


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE files write for each byte, as GPT-2 laid it down: visible
    Latin-1 stands for itself, the other bytes in order for U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in visible]
    characters = {chr(value): value for value in visible}
    return characters | {chr(256 + place): value for place, value in enumerate(hidden)}
