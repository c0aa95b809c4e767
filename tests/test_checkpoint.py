"""Checkpoints are read right, and nothing but data is read out of them (faults.md C-01..C-13)."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import checkpoints as make
import numpy as np
import pytest
from checkpoints import Call, Global, Persistent, Raw, storage, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv_cpp.checkpoint import SUFFIXES, open_checkpoint, write_checkpoint
from rwkv_cpp.errors import RWKVFileError

WEIGHTS = np.array([[0.5, -1.25, 3.0], [1e-3, 0.0, -7.0]], np.float32)
FORMATS = {
    "zip": make.torch_zip,
    "legacy": make.torch_legacy,
    "safetensors": lambda tensors: make.safetensors(
        {key: (CODES[values.dtype.name], values) for key, values in tensors.items()}
    ),
}
CODES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "uint16": "BF16"}


@pytest.fixture
def opened(tmp_path):
    """Write bytes to a file and open it as a checkpoint."""
    path = tmp_path / "checkpoint"

    def write_and_open(data: bytes, key: str | None = None):
        path.write_bytes(data)
        return open_checkpoint(path, key)

    return write_and_open


@pytest.fixture
def refused(opened):
    """Opening such a file fails within a second, with a text that matches."""

    def check(data: bytes, match: str | None = None, key: str | None = None) -> None:
        start = time.process_time()
        with pytest.raises(RWKVFileError, match=match) as caught:
            opened(data, key)
        assert time.process_time() - start < 1
        text = str(caught.value)
        assert len(text) < 1000
        assert text.isprintable()

    return check


def same_bits(actual: np.ndarray, expected: np.ndarray) -> bool:
    return (
        actual.dtype == expected.dtype == np.float32
        and actual.shape == expected.shape
        and actual.tobytes() == expected.tobytes()
    )


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_types(opened, form, dtype):  # C-10
    values = WEIGHTS.astype(dtype)
    with opened(FORMATS[form]({"a.weight": values, "b": values[0]})) as checkpoint:
        assert checkpoint.keys() == list(checkpoint) == ["a.weight", "b"]
        assert checkpoint.dtype("a.weight") == dtype
        assert checkpoint.shape("a.weight") == (2, 3)
        assert same_bits(checkpoint.read("b"), values[0].astype(np.float32))
        assert same_bits(checkpoint.read("a.weight"), values.astype(np.float32))


@pytest.mark.parametrize("form", FORMATS)
def test_every_bfloat16(opened, form):  # C-10
    bits = np.arange(1 << 16, dtype="<u2")
    expected = b"".join(b"\0\0" + struct.pack("<H", i) for i in range(1 << 16))
    with opened(FORMATS[form]({"a": bits})) as checkpoint:
        assert checkpoint.dtype("a") == "bfloat16"
        assert checkpoint.read("a").tobytes() == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-3e38, 3e38), min_size=1, max_size=50))
def test_float64_is_rounded_once(tmp_path_factory, values):  # C-10
    path = tmp_path_factory.getbasetemp() / "rounding"
    path.write_bytes(FORMATS["safetensors"]({"a": np.array(values)}))
    expected = struct.pack(f"<{len(values)}f", *values)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read("a").tobytes() == expected


@pytest.mark.parametrize("form", FORMATS)
def test_a_scalar_and_an_empty_tensor(opened, form):
    tensors = {"scalar": np.float32([7]).reshape(()), "empty": np.zeros((3, 0), np.float32)}
    with opened(FORMATS[form](tensors)) as checkpoint:
        for key, values in tensors.items():
            assert same_bits(checkpoint.read(key), values)


@pytest.mark.parametrize("form", FORMATS)
def test_whole_numbers_are_not_weights(opened, form):  # C-10
    with opened(FORMATS[form]({"steps": np.arange(3)})) as checkpoint:
        assert checkpoint.shape("steps") == (3,)
        with pytest.raises(RWKVFileError, match="steps: is int64, expected float32"):
            checkpoint.read("steps")


def test_views_of_one_storage(opened):
    values = np.arange(20, dtype=np.float32)
    base = storage("0", 20)
    root = {
        "whole": tensor(base, (4, 5)),
        "transposed": tensor(base, (5, 4), (1, 5)),
        "every other": tensor(base, (3,), (2,), 7),
        "block": tensor(base, (2, 2), (5, 1), 13),
        "old": Call("torch._utils", "_rebuild_tensor", (base, 5, (3,), (1,))),
        "parameter": Call(
            "torch._utils",
            "_rebuild_parameter",
            (tensor(base, (2,), (1,), 18), True, Call("collections", "OrderedDict", ())),
        ),
        "one element of any stride": tensor(base, (1, 3), (1000, 1), 17),
    }
    expected = {
        "whole": values.reshape(4, 5),
        "transposed": values.reshape(4, 5).T,
        "every other": values[[7, 9, 11]],
        "block": values[[[13, 14], [18, 19]]],
        "old": values[5:8],
        "parameter": values[18:],
        "one element of any stride": values[None, 17:],
    }
    with opened(make.archive(make.zip_files(root, [values.tobytes()]))) as checkpoint:
        assert checkpoint.keys() == list(root)
        for key, view in expected.items():
            assert same_bits(checkpoint.read(key), np.ascontiguousarray(view)), key


def test_ordered_dict_with_metadata(opened):
    """What state_dict() gives: an OrderedDict with an attribute, filled after it was made."""
    code = make.opcodes(Call("collections", "OrderedDict", ()))
    code += b"(" + make.opcodes("a") + make.opcodes(tensor(storage("0", 2), (2,))) + b"u"
    code += make.opcodes({"_metadata": Call("collections", "OrderedDict", ([("", {})],))}) + b"b"
    files = make.zip_files(Raw(code), [bytes(8)])
    with opened(make.archive(files)) as checkpoint:
        assert checkpoint.keys() == ["a"]


def test_the_file_is_closed(opened):
    checkpoint = opened(make.torch_zip({"a": WEIGHTS}))
    with checkpoint:
        pass
    with pytest.raises(RWKVFileError, match="closed file"):
        checkpoint.read("a")


def test_a_change_of_the_file_is_noticed(opened, tmp_path):  # C-16
    for form in FORMATS.values():
        with opened(form({"a": WEIGHTS, "b": WEIGHTS})) as checkpoint:
            checkpoint.read("a")
            with (tmp_path / "checkpoint").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x01")
            os.utime(tmp_path / "checkpoint", (1, 1))
            with pytest.raises(RWKVFileError, match=r"changed|damaged"):
                checkpoint.read("b")


# ---- against torch ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_against_torch(torch, tmp_path, new, protocol):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 8, generator=generator)
    module = torch.nn.Linear(4, 3)
    state = module.state_dict()
    for dtype in torch.float32, torch.float16, torch.bfloat16, torch.float64:
        values = base.to(dtype)
        state |= {
            f"{dtype}.whole": values,
            f"{dtype}.transposed": values.t(),
            f"{dtype}.slice": values[1:5:2, 2:7:3],
            f"{dtype}.row": values[3],
            f"{dtype}.parameter": torch.nn.Parameter(values.clone()),
            f"{dtype}.ones": values[:, :1, None],
            f"{dtype}.empty": values[:0],
            f"{dtype}.scalar": values[2, 2],
        }
    path = tmp_path / "model.pth"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    loaded = torch.load(path, weights_only=False)  # its weights_only knows protocol 2 alone
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.keys() == list(loaded)
        for key, value in loaded.items():
            assert checkpoint.dtype(key) == str(value.dtype).removeprefix("torch.")
            assert same_bits(checkpoint.read(key), value.detach().float().contiguous().numpy()), key


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_other_types_of_torch(torch, tmp_path, new):
    path = tmp_path / "model.pth"
    for dtype in ["int8", "uint8", "int16", "int32", "int64", "bool", "complex64"]:
        values = torch.ones(3, dtype=getattr(torch, dtype))
        torch.save({"a": values}, path, _use_new_zipfile_serialization=new)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.dtype("a") == dtype
            with pytest.raises(RWKVFileError, match=f"a: is {dtype}, expected"):
                checkpoint.read("a")


def test_an_expanded_tensor_of_torch(torch, tmp_path):  # C-02
    torch.save({"a": torch.ones(1).expand(1000)}, tmp_path / "model.pth")
    with pytest.raises(RWKVFileError, match="passes the end of its storage of 1"):
        open_checkpoint(tmp_path / "model.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(torch, tmp_path):  # C-06
    path = tmp_path / "model.pth"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(RWKVFileError, match=r"TorchScript.*torch\.jit\.load"):
        open_checkpoint(path)


def test_a_whole_module_of_torch(torch, tmp_path):  # C-01, C-06
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(RWKVFileError, match=r"global 'torch\.nn.*' is not allowed"):
        open_checkpoint(tmp_path / "model.pth")


def test_a_training_checkpoint_of_torch(torch, tmp_path):  # C-07
    path = tmp_path / "checkpoint.pth"
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, path)
    with pytest.raises(RWKVFileError, match=r"'model' .*'optimizer' .*'step' .*--key"):
        open_checkpoint(path)
    with open_checkpoint(path, "model") as checkpoint:
        assert same_bits(checkpoint.read("weight"), module.weight.detach().numpy())


# ---- C-01: nothing runs -------------------------------------------------------------------------


class Reduced:
    """Pickles as a call, as an attacker's object does."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads() -> dict[str, object]:
    touch = "touch executed"
    code = "open('executed', 'w')"
    calls = {
        "os.system": Call("os", "system", (touch,)),
        "posix.system": Call("posix", "system", (touch,)),
        "nt.system": Call("nt", "system", (touch,)),
        "eval": Call("builtins", "eval", (code,)),
        "eval of python 2": Call("__builtin__", "eval", (code,)),
        "exec": Call("builtins", "exec", (code,)),
        "open": Call("builtins", "open", ("executed", "w")),
        "getattr": Call("builtins", "getattr", (Global("os", "sys"), "modules")),
        "import": Call("builtins", "__import__", ("os",)),
        "subprocess": Call("subprocess", "Popen", (["touch", "executed"],)),
        "runpy": Call("runpy", "_run_code", (code, {})),
        "timeit": Call("timeit", "timeit", (code,)),
        "numpy": Call("numpy.testing._private.utils", "runstring", (code, {})),
        "torch.load": Call("torch", "load", ("executed",)),
        "torch.hub": Call("torch.hub", "load", ("a", "b")),
        "sparse": Call("torch._utils", "_rebuild_sparse_tensor", (1, 2)),
        "quantized": Call("torch._utils", "_rebuild_qtensor", (1, 2)),
        "meta": Call("torch._utils", "_rebuild_meta_tensor_no_storage", (1, 2, 3, False)),
        "operator": Call("operator", "attrgetter", ("system",)),
        "dotted": Call("collections", "OrderedDict.fromkeys", ((),)),
    }
    places: dict[str, object] = dict(calls)
    places["deep in a value"] = {"a": {"b": [({"c": calls["os.system"]},)]}}
    places["as a key"] = Raw(b"}" + make.opcodes(calls["os.system"]) + b"Ns")
    places["as a storage"] = Persistent(calls["os.system"])
    places["INST"] = Raw(b"(" + make.opcodes(touch) + b"ios\nsystem\n")
    places["OBJ"] = Raw(b"(" + make.opcodes(Global("os", "system")) + make.opcodes(touch) + b"o")
    places["NEWOBJ"] = Raw(make.opcodes(Global("os", "system")) + make.opcodes((touch,)) + b"\x81")
    places["EXT1"] = Raw(b"\x82\x01")
    places["STACK_GLOBAL"] = Raw(
        make.opcodes("os") + make.opcodes("system") + b"\x93" + make.opcodes((touch,)) + b"R"
    )
    return places


@pytest.mark.parametrize("name", payloads())
def test_no_code_runs(refused, tmp_path, monkeypatch, name):  # C-01
    monkeypatch.chdir(tmp_path)
    payload = payloads()[name]
    match = "not allowed"
    refused(make.archive(make.zip_files(payload)), match)
    refused(make.legacy(payload, {}), match)
    refused(make.legacy({}, {}, magic=payload), match)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_no_code_runs_as_python_pickles_it(refused, tmp_path, monkeypatch, protocol):  # C-01
    monkeypatch.chdir(tmp_path)
    for function, argument in (os.system, "touch executed"), (eval, "open('executed', 'w')"):
        data = pickle.dumps({"a": [Reduced(function, argument)]}, protocol)
        refused(make.archive(make.zip_files(data)), "global .* is not allowed")
        refused(data, "global .* is not allowed")
    assert not (tmp_path / "executed").exists()


# ---- C-02: allowed functions with wrong arguments -----------------------------------------------

BASE = storage("0", 6)
HOOKS = Call("collections", "OrderedDict", ())
ABUSES = {
    "negative stride": tensor(BASE, (2,), (-1,), 3),
    "negative offset": tensor(BASE, (2,), (1,), -1),
    "negative shape": tensor(BASE, (-2, -3), (3, 1)),
    "past the end": tensor(BASE, (7,)),
    "offset past the end": tensor(BASE, (2,), (1,), 5),
    "stride past the end": tensor(BASE, (2, 2), (5, 1)),
    "empty, offset past the end": tensor(BASE, (0,), (1,), 7),
    "repeated elements": tensor(BASE, (1 << 20, 1 << 20), (0, 0)),
    "huge shape": tensor(BASE, (1 << 40,) * 8),
    "many dimensions": tensor(BASE, (1,) * 9),
    "other numbers of strides": tensor(BASE, (2, 3), (1,)),
    "float in shape": tensor(BASE, (2.0,), (1,)),
    "bool in shape": tensor(BASE, (True,), (1,)),
    "string as shape": tensor(BASE, "23", (1, 1)),
    "list as strides": tensor(BASE, (2,), [1]),
    "None as offset": tensor(BASE, (2,), (1,), None),
    "no storage": tensor("0", (2,)),
    "tensor as storage": tensor(tensor(BASE, (2,)), (2,)),
    "too few arguments": Call("torch._utils", "_rebuild_tensor_v2", (BASE,)),
    "too many arguments": Call("torch._utils", "_rebuild_tensor", (BASE, 0, (1,), (1,), 1)),
    "conjugated": Call(
        "torch._utils", "_rebuild_tensor_v2", (BASE, 0, (1,), (1,), False, HOOKS, {"conj": True})
    ),
    "parameter of nothing": Call("torch._utils", "_rebuild_parameter", (None, False, HOOKS)),
    "call of a type": Call("torch", "FloatStorage", (1,)),
    "call of a tensor": Raw(make.opcodes(tensor(BASE, (1,))) + b")R"),
    "attributes of a tensor": Raw(make.opcodes(tensor(BASE, (1,))) + make.opcodes({}) + b"b"),
    "items of a tensor": Raw(make.opcodes(tensor(BASE, (1,))) + b"NNs"),
    "dictionary of numbers": Call("collections", "OrderedDict", (5,)),
    "dictionary of odd items": Call("collections", "OrderedDict", ([("a",)],)),
    "storage of a string": Persistent("0"),
    "storage of an empty tuple": Persistent(()),
    "storage of unknown type": Persistent(("storage", "FloatStorage", "0", "cpu", 6)),
    "storage without elements": storage("0", None),
    "storage of -6 elements": storage("0", -6),
    "storage of 2^70 elements": storage("0", 1 << 70),
    "storage with another number": storage("0", 5),
    "storage of another type": storage("0", 6, "float64"),
    "storage outside": storage("../version", 6),
    "storage that is not there": storage("1", 6),
}  # fmt: skip


@pytest.mark.parametrize("name", ABUSES)
def test_wrong_arguments(refused, name):  # C-02, C-05
    refused(make.archive(make.zip_files({"a": ABUSES[name]}, [bytes(24)])))


@pytest.mark.parametrize("name", ABUSES)
def test_wrong_arguments_in_the_legacy_format(refused, name):  # C-02, C-05
    refused(make.legacy({"a": ABUSES[name]}, {"0": (6, bytes(24))}))


# ---- C-03: pickles that are bombs ---------------------------------------------------------------


def laughs(n: int) -> bytes:
    """A tuple of two equal tuples, n times over: 2^n leaves in n steps."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(n))


BOMBS = {
    "nested lists": b"]" * 100_000 + b"a" * 99_999,
    "nested tuples": b")" + b"\x85" * 300_000,
    "nested dictionaries": b"}" + b"K\x00}" * 90_000 + b"s" * 90_000,
    "marks": b"(" * 1_000_000,
    "laughs": laughs(200),
    "laughs as a key": b"}" + laughs(200) + b"Ns",
    "laughs as a shape": make.opcodes(
        Call("torch._utils", "_rebuild_tensor_v2", (BASE, 0, Raw(laughs(200)), (1,), False, HOOKS))
    ),
    "laughs as a storage": laughs(200) + b"Q",
    "keys of one hash": b"}("
    + b"".join(make.opcodes(i * (2**61 - 1)) + b"N" for i in range(1, 50_000))
    + b"u",
    "memo of 2^31": b"Nr\xff\xff\xff\x7f",
    "LONG4 of 1 GB": b"\x8b" + struct.pack("<i", 1 << 30) + bytes(1000),
    "LONG4": b"\x8b" + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20),
    "LONG as text": b"L" + b"9" * 1_000_000 + b"L\n",
    "bytearray of 2^62": b"\x96" + struct.pack("<Q", 1 << 62),
    "bytes of 2^62": b"\x8e" + struct.pack("<Q", 1 << 62),
    "string of 4 GB": b"X\xff\xff\xff\xff",
    "long string": b"X" + struct.pack("<I", 15 << 20) + b"a" * (15 << 20) + b"0",
    "frame past the end": b"\x95" + struct.pack("<Q", 1 << 40) + b"N",
    "out-of-band buffer": b"\x97",
    "unknown opcode": b"\xff",
    "too long": b"N0" * (10 << 20),
    "empty stack": b"0",
    "tuple of too few": b"N\x86",
    "unknown memory": b"h\x07",
    "items of an odd number": b"}(Nu",
    "values left over": b"NN",
    "mark left over": b"(N",
    "surrogate": b"X\x02\0\0\0\xed\xa0",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(refused, name):  # C-03
    data = b"\x80\x05" + BOMBS[name] + b"."
    refused(make.archive(make.zip_files(data, [bytes(24)])))
    refused(make.legacy(Raw(BOMBS[name]), {"0": (6, bytes(24))}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_bombs_need_little_memory(tmp_path):  # C-03: all of them in 256 MiB
    for i, bomb in enumerate(BOMBS.values()):
        data = b"\x80\x05" + bomb + b"."
        (tmp_path / f"{i}").write_bytes(make.archive(make.zip_files(data, [bytes(24)])))
    code = r"""
import re, sys
from pathlib import Path
from rwkv_cpp.checkpoint import open_checkpoint
from rwkv_cpp.errors import RWKVFileError
for path in Path(sys.argv[1]).iterdir():
    try:
        open_checkpoint(path)
    except RWKVFileError:
        continue
    sys.exit(f"{path} was opened")
print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    output = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True
    )
    assert int(output.stdout) < 256 << 10


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_at_every_byte(refused, form):  # C-03, C-12
    data = FORMATS[form]({"a.weight": WEIGHTS, "b": WEIGHTS[0]})
    for length in range(len(data)):
        refused(data[:length])


@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_changed(opened, form):
    """A damaged file is refused, or reads like a sound one: no other exception, no hang."""
    data = bytearray(FORMATS[form]({"a.weight": WEIGHTS, "b": WEIGHTS[0]}))
    random = np.random.default_rng(1)
    for i in range(len(data)):
        before = data[i]
        data[i] ^= 1 << random.integers(8)
        try:
            with opened(bytes(data)) as checkpoint:
                for key in checkpoint:
                    checkpoint.read(key)
        except RWKVFileError:
            pass
        data[i] = before


# ---- C-04, C-05: archives -----------------------------------------------------------------------

CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


def patched(data: bytes, signature: bytes, index: int, offset: int, form: str, value: int) -> bytes:
    """Change a number in the index-th header of a kind."""
    at = -1
    for _ in range(index + 1):
        at = data.index(signature, at + 1)
    changed = bytearray(data)
    struct.pack_into(form, changed, at + offset, value)
    return bytes(changed)


def test_sound_archives_with_patches_that_change_nothing(opened):
    data = make.torch_zip({"a": WEIGHTS})
    assert patched(data, CENTRAL, 0, 10, "<H", 0) == data
    with opened(data) as checkpoint:
        assert same_bits(checkpoint.read("a"), WEIGHTS)


@pytest.mark.parametrize(
    "case",
    {
        "compressed": (CENTRAL, 2, 10, "<H", 8),
        "compressed in its own header": (LOCAL, 2, 8, "<H", 8),
        "encrypted": (CENTRAL, 2, 8, "<H", 1),
        "encrypted in its own header": (LOCAL, 2, 6, "<H", 1),
        "crc of data.pkl": (CENTRAL, 0, 16, "<I", 1),
        "crc in its own header": (LOCAL, 2, 14, "<I", 1),
        "packed size": (CENTRAL, 2, 20, "<I", 23),
        "size": (CENTRAL, 2, 24, "<I", 23),
        "size in its own header": (LOCAL, 2, 22, "<I", 23),
        "zip64 size without a field": (CENTRAL, 2, 24, "<I", 0xFFFFFFFF),
        "zip64 offset without a field": (CENTRAL, 2, 42, "<I", 0xFFFFFFFF),
        "offset": (CENTRAL, 2, 42, "<I", 5),
        "offset of another entry": (CENTRAL, 2, 42, "<I", 0),
        "offset past the end": (CENTRAL, 2, 42, "<I", 1 << 30),
        "length of the name": (CENTRAL, 2, 28, "<H", 5),
        "length of the name in its own header": (LOCAL, 2, 26, "<H", 5),
        "extra past the directory": (CENTRAL, 3, 30, "<H", 500),
        "comment": (CENTRAL, 3, 32, "<H", 5),
        "fewer entries": (END, 0, 10, "<H", 3),
        "more entries": (END, 0, 10, "<H", 5),
        "disk": (END, 0, 4, "<H", 1),
        "directory too long": (END, 0, 12, "<I", 1 << 20),
        "directory elsewhere": (END, 0, 16, "<I", 0),
        "comment at the end": (END, 0, 20, "<H", 1),
    }.items(),
    ids=lambda case: case[0],
)
def test_lying_headers(refused, case):  # C-04
    refused(patched(make.torch_zip({"a": WEIGHTS}), *case[1]))


def test_a_deflate_bomb(refused):  # C-04
    files = make.zip_files({"a": tensor(storage("0", 1 << 24), (1 << 24,))}, [bytes(1 << 26)])
    data = make.archive(files, zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 17
    refused(data, "compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_names(refused):  # C-04
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as out:
        for name, content in make.zip_files(*make.split({"a": WEIGHTS})).items():
            out.writestr(name, content)
        out.writestr("archive/data/0", bytes(24))
    refused(data.getvalue(), "occurs twice")


def test_entries_that_share_their_data(refused):  # C-04
    data = make.torch_zip({"a": WEIGHTS, "b": WEIGHTS})
    second = data.index(LOCAL, data.index(b"archive/data/0"))
    refused(patched(data, CENTRAL, 2, 42, "<I", second))


def test_an_entry_inside_another(refused):  # C-04
    data = make.torch_zip({"a": WEIGHTS, "b": WEIGHTS})
    start = data.index(LOCAL, data.index(b"archive/data/0"))
    whole = data[start : start + 30 + len("archive/data/1") + WEIGHTS.nbytes]
    outer = np.frombuffer(whole.ljust(-(-len(whole) // 4) * 4, b"\0"), "<f4")
    data = make.torch_zip({"a": outer, "b": WEIGHTS})
    refused(patched(data, CENTRAL, 3, 42, "<I", data.index(whole)), "overlap")


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "a\\b", "a//b", "a\nb"])
def test_odd_names(refused, name):  # C-04
    refused(make.archive(make.zip_files({}) | {name: b""}), "not a name that torch writes")


def test_wrong_checksum_of_weights(opened):  # C-04: seen when the weights are read
    data = make.torch_zip({"a": WEIGHTS, "b": WEIGHTS[0]})
    at = data.index(WEIGHTS[0].tobytes())
    with opened(data[:at] + b"\x01" + data[at + 1 :]) as checkpoint:
        with pytest.raises(RWKVFileError, match="wrong checksum of record 0"):
            checkpoint.read("a")
        assert same_bits(checkpoint.read("b"), WEIGHTS[0])


def test_too_many_entries(refused):  # C-04
    files = make.zip_files({}) | {f"archive/{i}": b"" for i in range(20_000)}
    refused(make.archive(files), "20004 entries|20003 entries")


@pytest.mark.parametrize("record", ["byteorder", "version"])
@pytest.mark.parametrize("content", [b"big", b"", b"0", b"11\n", b"\xff\x00", b"3.0", b"x" * 1000])
def test_odd_records(refused, record, content):  # C-05
    files = make.zip_files(*make.split({"a": WEIGHTS})) | {f"archive/{record}": content}
    refused(make.archive(files), "byte order|version")


def test_missing_records(refused, opened):  # C-04
    files = make.zip_files(*make.split({"a": WEIGHTS}))
    without_order = {name: data for name, data in files.items() if "byteorder" not in name}
    with opened(make.archive(without_order)) as checkpoint:  # as torch wrote before 2.1
        assert same_bits(checkpoint.read("a"), WEIGHTS)
    for record, match in (
        ("data.pkl", r"without the data\.pkl"),
        ("version", "version"),
        ("data/0", "storage '0' is not in"),
    ):
        left = {name: data for name, data in files.items() if not name.endswith(record)}
        refused(make.archive(left), match)
    refused(make.archive(files | {"other/data.pkl": b"N."}), r"without the data\.pkl")


@pytest.mark.parametrize("count", [0, 23, 25, 48])
def test_records_of_another_length(refused, count):  # C-05
    root, _ = make.split({"a": WEIGHTS})
    refused(make.archive(make.zip_files(root, [bytes(count)])), f"has {count} bytes, .* says 24")


# ---- the legacy format --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    {
        "magic": ({"magic": 7}, "torch.save did not write"),
        "magic of another type": ({"magic": "7"}, "torch.save did not write"),
        "version": ({"version": 1002}, "version 1002"),
        "big-endian": ({"little_endian": False}, "big-endian"),
        "endianness as a number": ({"little_endian": 1}, "big-endian"),
        "fewer elements": ({"data": {"0": (5, bytes(24))}}, "expected 6 elements"),
        "more elements": ({"data": {"0": (1 << 40, bytes(24))}}, "expected 6 elements"),
        "negative": ({"data": {"0": (-1, bytes(24))}}, "expected 6 elements"),
        "too short": ({"data": {"0": (6, bytes(23))}}, "23 bytes left"),
        "too long": ({"data": {"0": (6, bytes(25))}}, "1 bytes after the last"),
        "no storage": ({"data": {}}, "1 storages are not in the file"),
        "another storage": ({"data": {"1": (6, bytes(24))}}, "storage '1' is unknown"),
    }.items(),
    ids=lambda case: case[0],
)
def test_damaged_legacy_files(refused, case):  # C-05
    arguments, match = case[1]
    sound = {"root": {"a": tensor(BASE, (6,))}, "data": {"0": (6, bytes(24))}}
    refused(make.legacy(**(sound | arguments)), match)


def test_a_storage_described_in_two_ways(refused):  # C-02
    root = {"a": tensor(BASE, (6,)), "b": tensor(storage("0", 3, "float64"), (3,))}
    refused(make.legacy(root, {"0": (6, bytes(24))}), "in two ways")
    refused(make.legacy({"a": tensor(storage("0", 6, "float32", ("v", 0, 6)), (6,))}, {}))


# ---- C-06, C-07: files of another kind, checkpoints of another form -----------------------------


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (b"", "this is empty"),
        (b"GGUF\3\0\0\0", "GGUF file of llama.cpp"),
        (struct.pack("<6i", 0x67676D66, 101, 123, 8, 1, 0), "this is a ggmf model file"),
        (struct.pack(">6i", 0x67676D66, 101, 50, 8, 1, 0), "byte-swapped"),
        (b"lmgg", "'ggml'"),
        (b"<!DOCTYPE html>\n<html>", "HTML page: the download went wrong"),
        (b"\n <html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        (b"model.pt".ljust(257, b"\0") + b"ustar\x0000", "tar archive"),
        (b"\x1f\x8b\x08", "gzip"),
        (b'{"metadata": {}, "weight_map": {"a": "../../etc/passwd"}}', "joined first"),  # C-13
        (b"\x89HDF\r\n", "HDF5"),
        (pickle.dumps([1, 2]), "a pickle that torch.save did not write"),
        (make.archive({"word/document.xml": b""}), r"zip archive without the data\.pkl"),
        (make.archive(make.zip_files({}) | {"archive/code/a.py": b""}), "TorchScript"),
        (b"once upon a time", r"unknown format \(begins with b'once upo'\)"),
        (b"\x1b[2J\n\x00\xff", "unknown format"),
    ],
)
def test_foreign_files(refused, head, match):  # C-06
    refused(head, match)


def test_folders_and_pipes(tmp_path):
    with pytest.raises(RWKVFileError, match="not a regular file"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(RWKVFileError):
        open_checkpoint(Path("a\0b"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(RWKVFileError, match="not a regular file"):
            open_checkpoint(tmp_path / "pipe")


def test_nested_dictionaries_and_prefixes(opened, refused):  # C-07
    root, data = make.split({"model.a": WEIGHTS, "model.b": WEIGHTS[0], "other": WEIGHTS})
    nested = {"state_dict": root, "epoch": 3, "args": {"lr": 1e-3}, "list": [1], "7": None}
    whole = make.archive(make.zip_files(nested, data))
    refused(whole, r"'state_dict' \(dictionary of 3\), 'epoch' \(int\).*--key NAME")
    refused(whole, "it holds 'lr'", key="args")
    refused(whole, "--key 'nothing': not found among 'state_dict'", key="nothing")
    refused(whole, "no dictionary to look in", key="epoch/a")
    refused(whole, "is a int|is a", key="epoch")
    for key, names in (
        ("state_dict", ["model.a", "model.b", "other"]),
        ("state_dict/model", ["a", "b"]),
    ):
        with opened(whole, key) as checkpoint:
            assert checkpoint.keys() == names
            assert same_bits(checkpoint.read(names[1]), WEIGHTS[0])


@pytest.mark.parametrize(
    "root", [[], 5, "text", None, {}, tensor(BASE, (6,)), {3: tensor(BASE, (6,))}]
)
def test_roots_without_weights(refused, root):  # C-07
    refused(make.archive(make.zip_files(root, [bytes(24)])))


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[2J", "a" * 256, "ä", "a\0"])
def test_odd_tensor_names(refused, name):
    refused(make.torch_zip({name: WEIGHTS}), "not a name")
    refused(make.safetensors({name: ("F32", WEIGHTS)}), "not a name")


# ---- C-12: safetensors --------------------------------------------------------------------------


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more: object) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


SAFETENSORS = {
    "header of 0 bytes": {"length": 0},
    "header of 1 byte": {"length": 1},
    "header past the end": {"length": 1 << 20},
    "header of 2^32 bytes": {"length": 1 << 32},
    "header of 2^63 bytes": {"length": 1 << 63},
    "not an object": {"header": b"[]" + b" " * 40},
    "not JSON": {"header": b'{"a": {'},
    "not UTF-8": {"header": b'{"\xff": {}}'},
    "NaN": {"header": b'{"a": NaN}'},
    "deep": {"header": b'{"a":' * 100_000},
    "deep lists": {"header": b'{"a":' + b"[" * 100_000},
    "long number": {"header": b'{"a":' + b"9" * 100_000 + b"}"},
    "twice the same name": {"header": b'{"a": {}, "a": {}}'},
    "twice the same member": {"header": b'{"a": {"dtype": "F32", "dtype": "F32"}}'},
    "entry is a list": {"header": {"a": []}},
    "entry without dtype": {"header": {"a": {"shape": [6], "data_offsets": [0, 24]}}},
    "entry with more": {"header": entry(more=1)},
    "unknown dtype": {"header": entry("F8_E4M3", (24,))},
    "dtype is a list": {"header": entry(["F32"])},
    "shape is a number": {"header": entry(shape=6)},
    "negative shape": {"header": entry(shape=(-2, -3))},
    "float in shape": {"header": entry(shape=(2.0, 3))},
    "bool in shape": {"header": entry(shape=(True, 6))},
    "shape overflows": {"header": entry(shape=(1 << 32, 1 << 32))},
    "shape too small": {"header": entry(shape=(5,))},
    "many dimensions": {"header": entry(shape=(1,) * 9 + (6,))},
    "reversed offsets": {"header": entry(offsets=(24, 0))},
    "one offset": {"header": entry(offsets=(0,))},
    "gap at the start": {"header": entry(shape=(5,), offsets=(4, 24))},
    "gap in the middle": {"header": entry(shape=(1,), offsets=(0, 4))
                          | {"b": entry(shape=(4,), offsets=(8, 24))["a"]}},
    "overlap": {"header": entry() | {"b": entry()["a"]}},
    "end before the end": {"header": entry(shape=(5,), offsets=(0, 20))},
    "end past the end": {"header": entry(shape=(7,), offsets=(0, 28))},
    "tail": {"tail": b"\0"},
    "metadata is a list": {"header": entry() | {"__metadata__": []}},
    "metadata of numbers": {"header": entry() | {"__metadata__": {"a": 1}}},
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_damaged_safetensors(refused, name):  # C-12
    data = make.safetensors({"a": ("F32", WEIGHTS)}, **SAFETENSORS[name])
    refused(data)
    library = pytest.importorskip("safetensors")
    # These the package accepts: a limit of ours, a type that no weight has, an unknown member.
    if name not in ("many dimensions", "unknown dtype", "entry with more"):
        with pytest.raises(library.SafetensorError):
            library.deserialize(data)


def test_safetensors_with_metadata_and_padding(opened):
    data = make.safetensors(
        {"b": ("F32", WEIGHTS), "a": ("F16", WEIGHTS.astype(np.float16))},
        {"__metadata__": {"format": "pt"}},
    )
    length = struct.unpack("<Q", data[:8])[0]
    padded = struct.pack("<Q", length + 5) + data[8 : 8 + length] + b" " * 5 + data[8 + length :]
    for each in data, padded:
        with opened(each) as checkpoint:
            assert checkpoint.keys() == ["b", "a"]
            assert same_bits(checkpoint.read("a"), WEIGHTS.astype(np.float16).astype(np.float32))


def test_safetensors_header_of_any_length(opened):
    """Its first byte may be that of another format: 0x80 begins a pickle."""
    text = json.dumps(entry()).encode()
    for length in range(128, 128 + 256):
        with opened(make.safetensors({"a": ("F32", WEIGHTS)}, text.ljust(length))) as checkpoint:
            assert same_bits(checkpoint.read("a"), WEIGHTS)


ARRAYS = {
    "half": WEIGHTS.astype(np.float16)[:, :1],
    "single": WEIGHTS.T,
    "vector": WEIGHTS[0],
    "mix": WEIGHTS[:1, None],
}
LAYOUT = {key: (array.dtype, array.shape) for key, array in ARRAYS.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_checkpoint(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write_checkpoint(path, LAYOUT, ARRAYS.__getitem__)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.keys() == list(ARRAYS)
        for key, array in ARRAYS.items():
            assert checkpoint.dtype(key) == array.dtype.name
            assert same_bits(checkpoint.read(key), np.ascontiguousarray(array, np.float32))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="declared as"):
        write_checkpoint(path, LAYOUT, lambda key: ARRAYS["vector"])
    assert path.read_bytes() == before
    write_checkpoint(path, LAYOUT, ARRAYS.__getitem__)
    assert path.read_bytes() == before


def test_write_safetensors(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, LAYOUT, ARRAYS.__getitem__)
    loaded = package.load_file(path)
    assert set(loaded) == set(ARRAYS)
    for key, array in ARRAYS.items():
        assert loaded[key].dtype == array.dtype
        np.testing.assert_array_equal(loaded[key], array)


def test_write_what_torch_reads(tmp_path):
    """Python's own readers of zip files and of pickles, with what torch would put in: arrays."""
    path = tmp_path / "model.pth"
    write_checkpoint(path, LAYOUT, ARRAYS.__getitem__)
    dtypes = {"FloatStorage": np.float32, "HalfStorage": np.float16}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return rebuild
            return dtypes[name] if module == "torch" else super().find_class(module, name)

        def persistent_load(self, identity: tuple) -> np.ndarray:
            word, dtype, key, device, numel = identity
            assert (word, device) == ("storage", "cpu")
            data = np.frombuffer(archive.read(f"archive/data/{key}"), dtype)
            assert data.size == numel
            return data

    def rebuild(storage, offset, shape, strides, requires_grad, hooks) -> np.ndarray:
        assert (offset, requires_grad, hooks) == (0, False, {})
        steps = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage, shape, steps)

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/byteorder") == b"little"
        tensors = Unpickler(io.BytesIO(archive.read("archive/data.pkl"))).load()
        for entry in archive.infolist():
            start = entry.header_offset
            name, extra = struct.unpack_from("<2H", path.read_bytes(), start + 26)
            assert (start + 30 + name + extra) % 64 == 0
    assert list(tensors) == list(ARRAYS)
    for key, array in ARRAYS.items():
        assert tensors[key].dtype == array.dtype
        np.testing.assert_array_equal(tensors[key], array)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it(tmp_path, mmap):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    write_checkpoint(path, LAYOUT, ARRAYS.__getitem__)
    tensors = torch.load(path, weights_only=True, mmap=mmap)
    assert list(tensors) == list(ARRAYS)
    for key, array in ARRAYS.items():
        assert tensors[key].numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensors[key].numpy(), array)
