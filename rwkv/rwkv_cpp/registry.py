"""The released models by name, and where on the net what a user names lies.

One table: a new model is a new row. Names and hashes are those of the files that BlinkDL published
on the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import operator
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# The released sizes of RWKV-4: n_layer, n_embed.
SIZES = {
    "169M": (12, 768),
    "430M": (24, 1024),
    "1B5": (24, 2048),
    "3B": (32, 2560),
    "7B": (32, 4096),
    "14B": (40, 5120),
}
PILE, WORLD = 50277, 65536  # n_vocab, which tells the vocabulary


@dataclass(frozen=True)
class Row:
    """A released checkpoint. size: of SIZES; style: how a chat with it is written."""

    name: str
    size: str
    n_vocab: int
    style: str
    repo: str
    file: str
    sha256: str

    @property
    def nbytes(self) -> int:
        """Of the checkpoint, two for each weight: right to a thousandth."""
        n_layer, n_embed = SIZES[self.size]
        return 2 * n_embed * (2 * self.n_vocab + 13 * n_layer * n_embed)


ROWS = (
    Row(
        "RWKV-4-169M", "169M", PILE, "chat", "BlinkDL/rwkv-4-pile-169m",
        "RWKV-4-Pile-169M-20220807-8023.pth",
        "713c6f6137a08d3a86ab57df4f09ea03563329beb3bbabc23509d6c57aa0f9e2",
    ),
    Row(
        "RWKV-4-430M", "430M", PILE, "chat", "BlinkDL/rwkv-4-pile-430m",
        "RWKV-4-Pile-430M-20220808-8066.pth",
        "261e6b8fef1c7c9e08a4dde31bf5caf8e79c4da38126d77977a4707de82a7f64",
    ),
    Row(
        "RWKV-4-1B5", "1B5", PILE, "chat", "BlinkDL/rwkv-4-pile-1b5",
        "RWKV-4-Pile-1B5-20220929-ctx4096.pth",
        "6c97043e1bb0867368249290c97a2fe8ffc5ec12ceb1b5251f4ee911f9982c23",
    ),
    Row(
        "RWKV-4-3B", "3B", PILE, "chat", "BlinkDL/rwkv-4-pile-3b",
        "RWKV-4-Pile-3B-20221110-ctx4096.pth",
        "9500633f23d86fbae3cb3cbe7908b97b971e9561edf583c2c5c60b10b02bcc27",
    ),
    Row(
        "RWKV-4-7B", "7B", PILE, "chat", "BlinkDL/rwkv-4-pile-7b",
        "RWKV-4-Pile-7B-20230109-ctx4096.pth",
        "9ea1271b25deb6c72bd29f629147d5013cc7d7c69f9715192f6b6b92fca08f64",
    ),
    Row(
        "RWKV-4-14B", "14B", PILE, "chat", "BlinkDL/rwkv-4-pile-14b",
        "RWKV-4-Pile-14B-20230313-ctx8192-test1050.pth",
        "9e1b9b44f2a98124d86fe35e298f230e3a4fa7b60431962da282817ae1b0bf32",
    ),
    Row(
        "RWKV-4-Raven-1B5", "1B5", PILE, "raven", "BlinkDL/rwkv-4-raven",
        "RWKV-4-Raven-1B5-v12-Eng98%-Other2%-20230520-ctx4096.pth",
        "6bbbffb3ee2372dfa9ef49c599e9a2bc0a01b94b6a264ba9bf5bd524fc38f723",
    ),
    Row(
        "RWKV-4-Raven-3B", "3B", PILE, "raven", "BlinkDL/rwkv-4-raven",
        "RWKV-4-Raven-3B-v12-Eng98%-Other2%-20230520-ctx4096.pth",
        "1eea1845acfe9729dfdaec66a8d1aeb91a1287d94bebbca5529c13c050540b33",
    ),
    Row(
        "RWKV-4-Raven-7B", "7B", PILE, "raven", "BlinkDL/rwkv-4-raven",
        "RWKV-4-Raven-7B-v12-Eng98%-Other2%-20230521-ctx8192.pth",
        "5a725eaeb9e09b724de6c97e6845dd0283097c7920acd05b46852ab7afa9ec32",
    ),
    Row(
        "RWKV-4-Raven-14B", "14B", PILE, "raven", "BlinkDL/rwkv-4-raven",
        "RWKV-4-Raven-14B-v12-Eng98%-Other2%-20230523-ctx8192.pth",
        "1193b5a9ceab572e4dbb9ed1d798eab7bf4793d18904d08bd4bf183579338ae7",
    ),
    Row(
        "RWKV-4-Raven-Chinese-3B", "3B", PILE, "raven", "BlinkDL/rwkv-4-raven",
        "RWKV-4-Raven-3B-v12-Eng49%-Chn49%-Jpn1%-Other1%-20230527-ctx4096.pth",
        "c0abb4b745ba3523b9d8b3e1293110867ee55b1ef3dc8c122212f78396755721",
    ),
    Row(
        "RWKV-4-Raven-Chinese-7B", "7B", PILE, "raven", "BlinkDL/rwkv-4-raven",
        "RWKV-4-Raven-7B-v12-Eng49%-Chn49%-Jpn1%-Other1%-20230530-ctx8192.pth",
        "6d4a089ff36d5d9d96b669d425fc5e4e3959cab426535b52e2364df08f58b407",
    ),
    Row(
        "RWKV-4-World-0.1B", "169M", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-0.1B-v1-20230520-ctx4096.pth",
        "a10ef99df2a8f8a6801edf4fc92a9c49bedd63dcb900d3e5667a2136b3d671e7",
    ),
    Row(
        "RWKV-4-World-0.4B", "430M", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-0.4B-v1-20230529-ctx4096.pth",
        "4b4a2733cf5e5dc97dd62106f391d99895d16b11c5ccd10c89f28c52067a4919",
    ),
    Row(
        "RWKV-4-World-1.5B", "1B5", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-1.5B-v1-fixed-20230612-ctx4096.pth",
        "71f0c3229f9227cbcb8ae5fee6461197129a57e26366c4d23a49058417b046c9",
    ),
    Row(
        "RWKV-4-World-3B", "3B", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-3B-v1-20230619-ctx4096.pth",
        "1b227af317fa25b6939ab3c7cd321226ca48b8fe4bbbd2df3db669f1482c54ba",
    ),
    Row(
        "RWKV-4-World-7B", "7B", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-7B-v1-20230626-ctx4096.pth",
        "db7b011247a0fe4389e1d76e3d6a904185f85d509c8a44ad18bf401094efc293",
    ),
    Row(
        "RWKV-4-World-CHNtuned-0.1B", "169M", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-CHNtuned-0.1B-v1-20230617-ctx4096.pth",
        "a3888f9958d378ee6d4976ae1c02edb698f4382e426086febafb4a69417b9080",
    ),
    Row(
        "RWKV-4-World-CHNtuned-0.4B", "430M", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-CHNtuned-0.4B-v1-20230618-ctx4096.pth",
        "dbd5302cbee596bbc900f97eb10b2af3001a7f2c7e4d8643bf8683b2cdbdd324",
    ),
    Row(
        "RWKV-4-World-CHNtuned-1.5B", "1B5", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-CHNtuned-1.5B-v1-20230620-ctx4096.pth",
        "9f31f2ed5fe52dcf2d50208eb2efd764b9674dba2adb1baeff61997b4390a26b",
    ),
    Row(
        "RWKV-4-World-CHNtuned-3B", "3B", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-CHNtuned-3B-v1-20230625-ctx4096.pth",
        "7d3b5a4d0e9780a3e3d9ae7c2defbe8564d240bc9a238db4ba70cfb66dc33888",
    ),
    Row(
        "RWKV-4-World-CHNtuned-7B", "7B", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-CHNtuned-7B-v1-20230709-ctx4096.pth",
        "52d33e8352a40158d21425fee4f68df1515d6324056f788d2c78a366ef578ffa",
    ),
    Row(
        "RWKV-4-World-JPNtuned-7B", "7B", WORLD, "world", "BlinkDL/rwkv-4-world",
        "RWKV-4-World-JPNtuned-7B-v1-20230718-ctx4096.pth",
        "3e4c7664ce893ac1f6bb59cd76664fb5c872cb076bb82dbd534db0555b6e9fa5",
    ),
)  # fmt: skip

# The style of a model that is in no row, by n_vocab.
STYLES = {PILE: "chat", WORLD: "world"}
PLAIN_STYLE = "plain"

_HUB_URL = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)/(?:resolve|blob)/"
    r"(?P<revision>[^/]+)/(?P<file>[^?#]+)"
)
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Source:
    """A file on the net: on the hub, if `repo` is set, or at a URL.

    name: what the model is called in the cache; it depends on nothing that a server says.
    sha256: of the file, where it is known beforehand.
    """

    name: str
    repo: str | None
    file: str  # in the repository, or the URL
    revision: str = "main"
    sha256: str | None = None


def lookup(name: str) -> Row | None:
    """The row that a user names, in any case: "RWKV-4-169M", "169M", "BlinkDL/rwkv-4-pile-169m",
    "rwkv-4-pile-169m", or the file with or without its suffix. A repository with several models
    names none."""
    name = name.casefold()
    rows = [row for row in ROWS if name in _names(row)]
    return rows[0] if len(rows) == 1 else None


def row_of_file(path: Path) -> Row | None:
    """The row of a model file by its name, which begins with the row's or its checkpoint's."""
    file = path.name.casefold()
    found: list[tuple[int, Row]] = []
    for row in ROWS:
        for name in (row.name, row.file.removesuffix(".pth")):
            rest = file.removeprefix(name.casefold())
            if rest != file and not rest[:1].isalnum():
                found.append((len(name), row))
    return max(found, key=operator.itemgetter(0))[1] if found else None


def style_of(path: Path, n_vocab: int) -> str:
    """The name of the style in which a chat with this model is written."""
    row = row_of_file(path)
    return row.style if row and row.n_vocab == n_vocab else STYLES.get(n_vocab, PLAIN_STYLE)


def parse_source(text: str) -> Source | None:
    """What a name, `hf:REPO/FILE` or a URL stands for; None for any other text.

    Raises ValueError for an address that is not a sound one.
    """
    if row := lookup(text):
        return _source(row)
    if match := _HUB_URL.match(text):
        file = urllib.parse.unquote(match["file"])
        return _hub_source(match["repo"], file, match["revision"])
    if text.startswith("hf:"):
        parts = text[3:].split("/", 2)
        if len(parts) < 3:
            raise ValueError(f"'{text}': expected hf:OWNER/REPOSITORY/FILE")
        return _hub_source("/".join(parts[:2]), parts[2], "main")
    if "://" in text:
        url = urllib.parse.urlsplit(text)
        if url.scheme != "https" and not (url.scheme == "http" and url.hostname in _LOCAL_HOSTS):
            raise ValueError(f"'{text}': expected an https address")
        return Source(_cache_name(urllib.parse.unquote(url.path), text), None, text)
    return None


def _names(row: Row) -> set[str]:
    stem = row.file.removesuffix(".pth")
    names = {row.name, row.name.removeprefix("RWKV-4-"), row.file, stem}
    names |= {row.repo, row.repo.partition("/")[2]}
    return {name.casefold() for name in names}


def _source(row: Row) -> Source:
    return Source(row.name, row.repo, row.file, sha256=row.sha256)


def _hub_source(repo: str, file: str, revision: str) -> Source:
    if not file or ".." in file.split("/"):
        raise ValueError(f"'{file}' is no file of a repository")
    for row in ROWS:
        if (row.repo, row.file, "main") == (repo, file, revision):
            return _source(row)
    return Source(_cache_name(file, f"{repo}/{file}@{revision}"), repo, file, revision)


def _cache_name(path: str, address: str) -> str:
    """The file's name for people, and a hash so that no two addresses share one."""
    stem = re.sub(r"[^A-Za-z0-9._%-]+", "_", PurePosixPath(path).stem)[:100]
    return f"{stem or 'model'}.{hashlib.sha256(address.encode()).hexdigest()[:8]}"
