"""library.py: finding and loading the C library, its prototypes, its errors."""

import _ctypes
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from models import random_model, write_model
from reference import quants
from rwkv_cpp import library as lib
from rwkv_cpp.errors import RWKVFileError, RWKVLibraryNotFound
from rwkv_cpp.library import RWKVSharedLibrary, load_rwkv_shared_library

HEADER = Path(__file__).parents[1] / "rwkv.h"


@pytest.fixture(scope="module")
def library():
    return load_rwkv_shared_library()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "model.bin"
    write_model(path, random_model(1, n_vocab=50, n_embed=32, n_layer=2))
    return path


# ---- rwkv.h ----


def test_prototypes_are_those_of_the_header():
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text("utf-8"), flags=re.S)
    declared = dict(re.findall(r"RWKV_API [^;(]*?(rwkv_\w+)\(([^;]*)\);", text))
    # A default comes back by value: a library with a longer struct would write beyond ours.
    declared = {name: args for name, args in declared.items() if "_default_" not in name}
    assert set(lib._PROTOTYPES) == set(declared)
    for name, arguments in declared.items():
        count = 0 if arguments == "void" else arguments.count(",") + 1
        assert len(lib._PROTOTYPES[name]) - 1 == count, name


def test_api_version_is_the_headers():
    (version,) = re.findall(r"#define RWKV_API_VERSION (\d+)", HEADER.read_text("utf-8"))
    assert int(version) == lib.API_VERSION


C_TYPES = {
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "bool": ctypes.c_bool,
    "const char *": ctypes.c_char_p,
    "rwkv_progress": lib._PROGRESS,
    "void *": ctypes.c_void_p,
}


@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("rwkv_load_options", lib._LoadOptions),
        ("rwkv_context_options", lib._ContextOptions),
        ("rwkv_quantize_options", lib._QuantizeOptions),
        ("rwkv_memory", lib._Memory),
        ("rwkv_sequence", lib.SequenceStruct),
    ],
)
def test_structs_are_the_headers(name, mirror):
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text("utf-8"), flags=re.S)
    (body,) = re.findall(rf"^struct {name} \{{(.*?)^\}};", text, re.S | re.M)
    members = re.findall(r"([\w ]+?\*?) *(\w+);", " ".join(body.split()))
    assert [(member, C_TYPES.get(kind.strip(), ctypes.c_void_p)) for kind, member in members] == [
        (member, kind) for member, kind in mirror._fields_
    ]


def test_estimate_and_limits_come_back_whole(library, model_path):
    memory = library.rwkv_estimate(model_path)
    assert memory.file == model_path.stat().st_size
    assert memory.token < memory.file - 4 * 50 * 32  # a token reads all but the embedding
    assert memory.token > 0.8 * memory.file
    limits = library.rwkv_measure(2, 1 << 16)
    assert limits.n_threads == 2
    assert all(1e8 < limit < 1e15 for limit in limits[1:])
    with pytest.raises(ValueError, match="n_bytes must be"):
        library.rwkv_measure(2, -1)


# ---- finding ----


def test_variable_decides_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_LIBRARY_PATH", str(tmp_path / "missing.so"))
    with pytest.raises(RWKVLibraryNotFound, match=r"missing\.so"):
        load_rwkv_shared_library()


def test_given_path(library):
    assert load_rwkv_shared_library(library.path).path == library.path
    assert load_rwkv_shared_library(os.fsencode(library.path)).path == library.path


def test_file_that_is_no_library(tmp_path):
    path = tmp_path / lib.FILE_NAME
    path.write_text("not a library")
    with pytest.raises(RWKVLibraryNotFound, match="cannot be loaded"):
        RWKVSharedLibrary(path)


def test_other_library():
    with pytest.raises(RWKVLibraryNotFound, match="has no function rwkv_get_api_version"):
        RWKVSharedLibrary(_ctypes.__file__)


@pytest.mark.parametrize("expected", [1999, 2000, 0])
def test_other_api_version(library, monkeypatch, expected):
    monkeypatch.setattr(lib, "API_VERSION", expected)
    with pytest.raises(
        RWKVLibraryNotFound, match=rf"has API version 1\.\d+, expected {expected // 1000}\."
    ):
        RWKVSharedLibrary(library.path)


def test_not_found_names_every_path_and_how_to_build(tmp_path, monkeypatch):
    broken = tmp_path / "broken.so"
    broken.write_text("x")
    paths = [tmp_path / "a" / lib.FILE_NAME, tmp_path / "b" / lib.FILE_NAME, broken]
    monkeypatch.setattr(lib, "_candidates", lambda: iter(paths))
    with pytest.raises(RWKVLibraryNotFound) as error:
        lib._load.__wrapped__(None)
    for text in [*map(str, paths), "no such file", "cannot be loaded", "pip install", "cmake -D"]:
        assert text in str(error.value)


def test_broken_candidate_is_passed_over(library, tmp_path, monkeypatch):
    broken = tmp_path / lib.FILE_NAME
    broken.write_text("x")
    monkeypatch.setattr(lib, "_candidates", lambda: iter([broken, library.path]))
    assert lib._load.__wrapped__(None).path == library.path


def test_candidates_begin_in_the_package_and_end_with_what_is_installed(tmp_path, monkeypatch):
    info = tmp_path / "rwkv_ggml-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rwkv-ggml\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"rwkv_cpp/cli.py,,\nrwkv_cpp/{lib.FILE_NAME},,\n")
    installed = tmp_path / "rwkv_cpp" / lib.FILE_NAME
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.syspath_prepend(tmp_path)
    paths = list(lib._candidates())
    assert paths[0] == Path(lib.__file__).with_name(lib.FILE_NAME)
    assert paths[-1] == installed


def test_candidates_are_not_in_the_working_directory(tmp_path):
    code = "from rwkv_cpp import library; print(*library._candidates(), sep='\\n')"
    environment = os.environ | {"PYTHONPATH": package_root()}
    for folder in ("", "build", "bin/Release", "../bin/Release"):
        (tmp_path / "cwd" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cwd" / folder / lib.FILE_NAME).write_text("trap")
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "cwd",
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert shown
    for path in map(Path, shown):
        assert path.is_absolute()
        assert tmp_path not in path.parents


def package_root() -> str:
    return str(Path(lib.__file__).parents[1])


# ---- errors ----


def test_errors_have_the_librarys_text(library, model_path, tmp_path, capfd):
    cases = [
        (RWKVFileError, "nothing.bin", lambda: library.rwkv_load(tmp_path / "nothing.bin")),
        (RWKVFileError, "nothing.bin", lambda: library.rwkv_estimate(tmp_path / "nothing.bin")),
        (RWKVFileError, str(tmp_path), lambda: library.rwkv_load(tmp_path)),
        (ValueError, "NUL", lambda: library.rwkv_load("a\0b")),
        (ValueError, "Q9", lambda: library.rwkv_quantize_file(model_path, tmp_path / "o", "Q9")),
        (ValueError, "A8", lambda: library.rwkv_load(model_path, activations="A8")),
        (ValueError, "thread_count", lambda: library.rwkv_load(model_path, 0)),
        (ValueError, "thread_count", lambda: library.rwkv_load(model_path, 1025)),
        (ValueError, "thread_count", lambda: library.rwkv_init_from_file(model_path, 2**32 + 1)),
        (TypeError, "thread_count", lambda: library.rwkv_load(model_path, "4")),
        (TypeError, "thread_count", lambda: library.rwkv_load(model_path, True)),
    ]
    for kind, text, call in cases:
        with pytest.raises(kind, match=re.escape(text)):
            call()
        assert type(catch_in_thread(call)) is kind
    assert capfd.readouterr() == ("", "")


def catch(call):
    try:
        call()
    except BaseException as error:
        return error


def catch_in_thread(call):
    errors = []
    thread = threading.Thread(target=lambda: errors.append(catch(call)))
    thread.start()
    thread.join()
    return errors[0]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
def test_path_that_is_not_utf8(library, model_path, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe.bin"
    Path(os.fsdecode(name)).write_bytes(model_path.read_bytes())
    for path in (name, os.fsdecode(name)):
        library.rwkv_load(path, 1).free()


# ---- loading ----


@pytest.mark.parametrize("mmap", [False, True])
def test_progress_runs_to_the_file_size(library, model_path, mmap):
    calls = []
    library.rwkv_load(model_path, 1, mmap=mmap, progress=lambda *call: calls.append(call)).free()
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1] == model_path.stat().st_size
    assert set(totals) == {totals[-1]}


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("in_thread", [False, True])
def test_exception_in_progress_cancels(library, model_path, tmp_path, kind, in_thread):
    def progress(done, total):
        raise kind("from progress")

    target = tmp_path / "quantized.bin"
    calls = [
        lambda: library.rwkv_load(model_path, 1, progress=progress),
        lambda: library.rwkv_quantize_file(model_path, target, "Q8_0", progress=progress),
    ]
    for call in calls:
        error = catch_in_thread(call) if in_thread else catch(call)
        assert type(error) is kind
        assert error.args == ("from progress",)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no SIGINT there")
def test_interrupt_waits_for_the_call():
    interrupted = threading.Event()
    ended = []

    def call():
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.wait(20)
        os.kill(os.getpid(), signal.SIGINT)  # a second Ctrl-C changes nothing
        ended.append(interrupted.is_set())

    with pytest.raises(KeyboardInterrupt):
        lib._interruptible(call, interrupted.set)
    assert ended == [True]


def test_interruptible_passes_results_and_errors_on():
    assert lib._interruptible(lambda: 5, lambda: None) == 5
    with pytest.raises(ZeroDivisionError):
        lib._interruptible(lambda: 1 // 0, lambda: None)


# ---- the low-level functions ----


def test_evaluation_through_addresses(library, model_path):
    ctx = library.rwkv_init_from_file(model_path, 1)
    n_state = library.rwkv_get_state_len(ctx)
    n_vocab = library.rwkv_get_logits_len(ctx)
    assert library.rwkv_get_state_buffer_element_count(ctx) == n_state == 2 * 5 * 32
    assert library.rwkv_get_logits_buffer_element_count(ctx) == n_vocab == 50
    assert library.rwkv_get_n_vocab(ctx) == 50
    assert library.rwkv_get_n_embed(ctx) == 32
    assert library.rwkv_get_n_layer(ctx) == 2

    def buffers():
        return np.zeros(n_state, np.float32), np.zeros(n_vocab, np.float32)

    state, logits = buffers()
    for i, token in enumerate([1, 2, 3]):
        state_in = state.ctypes.data if i else None
        library.rwkv_eval(ctx, token, state_in, state.ctypes.data, logits.ctypes.data)
    other_state, other_logits = buffers()
    library.rwkv_eval_sequence(
        ctx, [1, 2, 3], None, other_state.ctypes.data, other_logits.ctypes.data
    )
    assert np.array_equal(state, other_state)
    assert np.array_equal(logits, other_logits)
    other_state, other_logits = buffers()
    library.rwkv_eval_sequence_in_chunks(
        ctx, [1, 2, 3], 2, None, other_state.ctypes.data, other_logits.ctypes.data
    )
    assert np.array_equal(state, other_state)
    assert np.array_equal(logits, other_logits)
    library.rwkv_eval(ctx, 1, None, None, None)

    for token in (50, 2**32 + 5, -1):
        with pytest.raises(ValueError):
            library.rwkv_eval(ctx, token, None, None, None)
    library.rwkv_free(ctx)
    library.rwkv_free(ctx)
    with pytest.raises(RuntimeError, match="closed"):
        library.rwkv_eval(ctx, 1, None, None, None)


def test_quantize_by_name_and_by_number_of_2023(library, model_path, tmp_path):
    for number in range(2, 10):
        name = library.rwkv_get_format_name(number)
        library.rwkv_quantize_model_file(model_path, tmp_path / "by_name", name)
        library.rwkv_quantize_model_file(model_path, tmp_path / "by_number", number)
        assert (tmp_path / "by_name").read_bytes() == (tmp_path / "by_number").read_bytes()
    with pytest.raises(ValueError):
        library.rwkv_quantize_model_file(model_path, tmp_path / "by_number", 10)


def test_estimate_is_of_the_file(library, model_path):
    memory = library.rwkv_estimate(model_path)
    assert memory.file == model_path.stat().st_size
    assert memory.state == 4 * 2 * 5 * 32
    assert 0 < memory.mapped < memory.file
    copied = library.rwkv_estimate(model_path, mmap=False)
    assert copied.mapped == 0
    assert copied.weights >= memory.mapped


def test_estimate_of_a_shape_is_that_of_such_a_file(library, tmp_path):
    path, quantized = tmp_path / "model.bin", tmp_path / "quantized.bin"
    n_embed = 32
    tensors = random_model(1, n_vocab=64, n_embed=n_embed, n_layer=2, n_ffn=4 * n_embed)
    for name in quants.PLAIN:
        write_model(path, tensors, name)
        assert library.rwkv_estimate_shape(64, n_embed, 2, name) == library.rwkv_estimate(path)
    for data_type in range(2, 10):
        name = library.rwkv_get_format_name(data_type)
        library.rwkv_quantize_file(path, quantized, name)
        shape = library.rwkv_estimate_shape(64, n_embed, 2, name)
        assert shape == library.rwkv_estimate(quantized), name


def test_estimate_with_a_quantized_head(library, tmp_path):
    path, quantized = tmp_path / "model.bin", tmp_path / "quantized.bin"
    write_model(path, random_model(1, n_vocab=64, n_embed=32, n_layer=2, n_ffn=128), "FP16")
    for name in ("Q4_0", "Q5_1", "Q8_0"):
        library.rwkv_quantize_file(path, quantized, "Q4_1", head=name)
        of_file = library.rwkv_estimate(quantized)
        of_shape = library.rwkv_estimate_shape(64, 32, 2, "Q4_1", head=name)
        assert of_shape._replace(file=of_file.file) == of_file
        assert library.rwkv_estimate(quantized, head=name) == of_file
    with pytest.raises(ValueError, match="rows of 48 weights, but Q8_0 needs"):
        library.rwkv_estimate_shape(64, 48, 2, "FP16", head="Q8_0")


def test_system_info_names_the_active_kernels(library):
    assert re.search(r"\bISA=\w+", library.rwkv_get_system_info_string())


# ---- formats ----


def test_format_names(library):
    for name, data_type in quants.TYPE_IDS.items():
        assert library.rwkv_get_format_name(data_type) == name
    for unknown in (10, 16, 255, 2**32 - 1):
        assert library.rwkv_get_format_name(unknown) is None


@pytest.mark.parametrize("version", [100, 101])
@pytest.mark.parametrize("name", quants.TYPE_IDS)
def test_row_sizes(library, version, name):
    data_type = quants.TYPE_IDS[name]
    if name not in quants.PLAIN and (version, name) not in quants.LAYOUTS:
        assert library.rwkv_get_row_size(version, data_type, 64) == 0
        return
    size = library.rwkv_get_row_size(version, data_type, 64)
    assert size == quants.row_bytes(version, name, 64)
    if name not in quants.PLAIN:
        assert library.rwkv_get_row_size(version, data_type, 40) == 0
    assert library.rwkv_get_row_size(102, data_type, 64) == 0


FORMATS = [(version, name) for version in (100, 101) for name in quants.PLAIN] + [*quants.LAYOUTS]


@pytest.mark.parametrize("source", FORMATS)
def test_rows_of_one_format_in_another(library, source):
    def convert(row: np.ndarray, target: tuple[int, str], n: int) -> np.ndarray:
        out = np.zeros(quants.row_bytes(*target, n), np.uint8)
        (version, name), (new, into) = source, target
        numbers = quants.TYPE_IDS[name], quants.TYPE_IDS[into]
        library.rwkv_convert_row(
            version, numbers[0], row.ctypes.data, new, numbers[1], out.ctypes.data, n
        )
        return out

    values = np.random.default_rng(1).standard_normal((1, 96)).astype(np.float32)
    row = quants.quantize(*source, values)
    for version, name in FORMATS:
        if name == source[1] and name not in quants.PLAIN:
            expected = quants.pack(version, name, quants.unpack(*source, row))
        else:
            expected = quants.quantize(version, name, quants.dequantize(*source, row, 96))
        assert np.array_equal(convert(row, (version, name), 96), expected.reshape(-1)), name
    if source[1] in quants.PLAIN:
        short = convert(row, (101, "FP16"), 35)
        assert np.array_equal(short, convert(row, (101, "FP16"), 96)[: 2 * 35])


def test_rows_that_cannot_be_converted(library):
    at = np.zeros(64, np.uint8).ctypes.data
    for arguments, text in (
        ((101, 5, at, 101, 9, at, 32), "version 101 have no rows of 32 weights in data type 5"),
        ((101, 0, at, 101, 9, at, 31), "version 101 have no rows of 31 weights in data type 9"),
        ((101, 0, at, 102, 0, at, 1), "version 102"),
        ((101, 99, at, 101, 99, at, 0), "rows of 0 weights in data type 99"),
        ((101, 0, 0, 101, 0, at, 1), "in"),
    ):
        with pytest.raises(ValueError, match=text):
            library.rwkv_convert_row(*arguments)
    row = np.zeros((2, 12), np.uint16)  # two blocks of Q4_1_O; the third number is the index
    row[1, 2] = 32
    out = np.empty(64, np.float32)
    with pytest.raises(RWKVFileError, match="block 1 of Q4_1_O has an outlier where none can be"):
        library.rwkv_convert_row(100, 4, row.ctypes.data, 101, 0, out.ctypes.data, 64)
