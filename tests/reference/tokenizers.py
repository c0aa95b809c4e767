"""The World and the 20B tokenizer, slowly: each rule applied as it is stated, on plain lists.

Files are read with the standard library alone. Unlike the package these check nothing.
"""

import ast
import functools
import itertools
import json
import re
import unicodedata
from pathlib import Path


class SlowWorld:
    """At each place the longest token that fits, found by trying all lengths downwards."""

    def __init__(self, path: Path) -> None:
        self.ids: dict[bytes, int] = {}
        for line in path.read_bytes().decode("utf-8").split("\n"):
            if match := re.fullmatch(r"(\d+) (.+) (\d+)\r?", line):
                token = ast.literal_eval(match[2])
                token = token if isinstance(token, bytes) else token.encode("utf-8")
                self.ids[token] = int(match[1])
        self.bytes = {index: token for token, index in self.ids.items()}
        self.longest = max(map(len, self.ids))

    def encode_bytes(self, data: bytes) -> list[int]:
        tokens = []
        start = 0
        while start < len(data):
            end = min(start + self.longest, len(data))
            while data[start:end] not in self.ids:
                end -= 1
            tokens.append(self.ids[data[start:end]])
            start = end
        return tokens


CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
WHITE_SPACE = "\t\n\v\f\r\x20\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
# GPT-2's expression, written for one letter per character that gives its class: letters, numbers,
# space, other white space, others.
PIECE = re.compile(r" ?L+| ?N+| ?O+|[ W]+(?![LNO])|[ W]+")


class Slow20B:
    """NFC, runs of spaces that are tokens, pieces by GPT-2's expression, then in each piece the
    merge that comes first in the file, for as long as there is one."""

    def __init__(self, path: Path) -> None:
        definition = json.loads(path.read_bytes())
        self.ids = definition["model"]["vocab"]
        self.ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(definition["model"]["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            self.ranks[left, right] = rank
        added = {t["content"]: t["id"] for t in definition["added_tokens"] if not t["special"]}
        self.added = added
        runs = sorted(added, key=len, reverse=True)
        self.split = re.compile("(" + "|".join(map(re.escape, runs)) + ")") if runs else None
        self.character = byte_characters()

    def encode(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        tokens = []
        for part in self.split.split(text) if self.split else [text]:
            if part in self.added:
                tokens.append(self.added[part])
            else:
                for piece in pieces(part):
                    tokens += self.merge(piece)
        return tokens

    @functools.cache  # noqa: B019
    def merge(self, piece: str) -> list[int]:
        symbols = [self.character[byte] for byte in piece.encode("utf-8")]
        while True:
            pairs = [pair for pair in itertools.pairwise(symbols) if pair in self.ranks]
            if not pairs:
                return [self.ids[symbol] for symbol in symbols]
            best = min(pairs, key=self.ranks.__getitem__)
            place = 0
            while place < len(symbols) - 1:
                if (symbols[place], symbols[place + 1]) == best:
                    symbols[place : place + 2] = ["".join(best)]
                place += 1


def pieces(text: str) -> list[str]:
    classes = "".join(map(character_class, text))
    found = []
    place = 0
    while place < len(text):
        end = next((place + len(c) for c in CONTRACTIONS if text.startswith(c, place)), None)
        end = end or PIECE.match(classes, place).end()
        found.append(text[place:end])
        place = end
    return found


def character_class(character: str) -> str:
    if character == " ":
        return " "
    if character in WHITE_SPACE:
        return "W"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def byte_characters() -> dict[int, str]:
    """GPT-2's way to write bytes: those that are not to be seen get characters from U+0100 on."""
    table = {}
    hidden = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(hidden)
            hidden += 1
    return table
