"""registry.py: names, addresses and what they stand for."""

import re
from pathlib import Path

import pytest
from rwkv_cpp.registry import PILE, ROWS, SIZES, WORLD, Row, lookup, parse_source, row_of_file
from rwkv_cpp.registry import style_of as style
from rwkv_cpp.tokenizer import PUBLISHED


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows(row: Row) -> None:
    assert row.size in SIZES
    assert row.n_vocab in [vocabulary.n_vocab for vocabulary in PUBLISHED]
    assert re.fullmatch(r"[0-9a-f]{64}", row.sha256)
    assert row.file.startswith("RWKV-4-")
    assert row.file.endswith(".pth")
    assert row.repo.startswith("BlinkDL/rwkv-4-")
    assert lookup(row.name) is row
    assert row_of_file(Path(f"{row.name}-Q5_1.bin")) is row
    assert row_of_file(Path("here") / row.file) is row
    assert ("World" in row.name) == (row.n_vocab == WORLD) == (row.style == "world")


def test_nothing_occurs_twice() -> None:
    for column in ("name", "file", "sha256"):
        assert len({getattr(row, column) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [  # of the published files, as a list of the community's has them
        ("RWKV-4-World-0.1B", 385_594_610),
        ("RWKV-4-World-0.4B", 923_362_866),
        ("RWKV-4-World-1.5B", 3_155_281_586),
        ("RWKV-4-Raven-3B", 5_969_345_074),
        ("RWKV-4-World-7B", 15_035_393_586),
        ("RWKV-4-Raven-14B", 28_297_309_490),
    ],
)
def test_nbytes(name: str, nbytes: int) -> None:
    assert lookup(name).nbytes == pytest.approx(nbytes, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "RWKV-4-169M",
        "rwkv-4-169m",
        "169M",
        "BlinkDL/rwkv-4-pile-169m",
        "rwkv-4-pile-169m",
        "RWKV-4-Pile-169M-20220807-8023",
        "RWKV-4-Pile-169M-20220807-8023.pth",
        "hf:BlinkDL/rwkv-4-pile-169m/RWKV-4-Pile-169M-20220807-8023.pth",
        "https://huggingface.co/BlinkDL/rwkv-4-pile-169m/resolve/main/"
        "RWKV-4-Pile-169M-20220807-8023.pth",
        "https://huggingface.co/BlinkDL/rwkv-4-pile-169m/blob/main/"
        "RWKV-4-Pile-169M-20220807-8023.pth?download=true",
    ],
)
def test_names_of_one_model(name: str) -> None:
    source = parse_source(name)
    assert source.name == "RWKV-4-169M"
    assert source.repo == "BlinkDL/rwkv-4-pile-169m"
    assert source.sha256 == ROWS[0].sha256


@pytest.mark.parametrize("name", ["", "nonsense", "BlinkDL/rwkv-4-raven", "model.bin", "a/b/c.pth"])
def test_what_is_no_name(name: str) -> None:
    assert parse_source(name) is None


def test_percent_signs_in_addresses() -> None:
    source = parse_source(
        "https://huggingface.co/BlinkDL/rwkv-4-raven/resolve/main/"
        "RWKV-4-Raven-7B-v12-Eng98%25-Other2%25-20230521-ctx8192.pth"
    )
    assert source.name == "RWKV-4-Raven-7B"


def test_other_addresses() -> None:
    """N-03: the cache's names come from what was asked for, and no two addresses share one."""
    addresses = [
        "hf:someone/models/sub/tiny.pth",
        "hf:someone/models/tiny.pth",
        "https://huggingface.co/someone/models/resolve/v2/tiny.pth",
        "https://example.com/tiny.pth",
        "https://example.com/a/../tiny.pth?x=/../y",
        "https://example.com/%2e%2e/CON",
        "https://example.com",
    ]
    names = [parse_source(address).name for address in addresses]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9._%-]+\.[0-9a-f]{8}", name)
        assert not name.startswith(".")
    assert parse_source(addresses[2]).revision == "v2"


@pytest.mark.parametrize(
    "address",
    ["hf:model.pth", "hf:a/b", "hf:a/b/", "hf:a/b/../c", "http://example.com/x", "ftp://a/b"],
)
def test_unsound_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected|no file"):
        parse_source(address)


def test_styles() -> None:
    assert style(Path("RWKV-4-Raven-7B-Q5_1.bin"), PILE) == "raven"
    assert style(Path("RWKV-4-Raven-7B-Q5_1.bin"), 256) == "plain"
    assert style(Path("mine.bin"), PILE) == "chat"
    assert style(Path("mine.bin"), WORLD) == "world"
    assert style(Path("mine.bin"), 256) == "plain"
    assert row_of_file(Path("RWKV-4-169Mega.bin")) is None
