"""pull.py and download.py, against a hub on this machine (faults.md N-01 to N-06)."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkpoints import torch_zip
from commands import CONSOLE, environment, run, rwkv
from hub_server import Hub
from models import random_model, write_model
from rwkv_cpp import registry
from rwkv_cpp.convert import convert
from rwkv_cpp.quantize import quantize_file

TENSORS = random_model(1, n_embed=32, n_layer=2)
CONTENT = torch_zip(TENSORS)
FOREIGN = torch_zip(TENSORS | {"blocks.0.att.gate.weight": TENSORS["head.weight"]})
NAME = "hf:someone/tiny/model.pth"
QUICK = """
import sys
from rwkv_cpp import cli, download, registry
download.PAUSE_SECONDS = 0.01
registry.ROWS += tuple(registry.Row(*row) for row in {rows!r})
cli.main()
"""


@pytest.fixture
def hub(tmp_path):
    page = b"<!DOCTYPE html><html>what a page</html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    write_model(tmp_path / "q.bin", TENSORS, "Q5_1")
    files = {
        "model.pth": CONTENT,
        "100% other.pth": CONTENT,
        "foreign.pth": FOREIGN,
        "page.pth": page,
        "pointer.pth": pointer,
        "empty.pth": b"",
        "ready.bin": (tmp_path / "q.bin").read_bytes(),
    }
    with Hub({"someone/tiny": files, "": {"loose.pth": CONTENT, "empty.pth": b""}}) as hub:
        yield hub


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def settings(hub, home, tmp_path):
    return environment(
        HF_ENDPOINT=hub.endpoint,
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_OFFLINE="0",
        HF_TOKEN="hf_secret",
        NO_PROXY="*",
        RWKV_HOME=str(home),
    )


@pytest.fixture
def pull(settings):
    """Runs `rwkv pull` in a process of its own, with short pauses."""

    def call(*arguments, rows=(), **variables):
        command = [sys.executable, "-c", QUICK.format(rows=list(rows)), "pull", *arguments]
        return run(command, env=settings | variables)

    return call


def expected(folder: Path, format: str = "FP16") -> bytes:
    """What the commands make of the checkpoint."""
    (folder / "expected.pth").write_bytes(CONTENT)
    plain, quantized = folder / "expected-FP16.bin", folder / "expected-quantized.bin"
    convert(folder / "expected.pth", plain, "FP32" if format == "FP32" else "FP16")
    if format in ("FP16", "FP32"):
        return plain.read_bytes()
    quantize_file(plain, quantized, format)
    return quantized.read_bytes()


def kept(home: Path) -> list[str]:
    """The names of all files in the cache but the locks."""
    return sorted(
        path.name for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def succeeds(done: subprocess.CompletedProcess, home: Path, format: str = "FP16") -> Path:
    """Checks what a pull has printed and left; returns the model file."""
    assert (done.returncode, done.stderr) == (0, "")
    path = Path(done.stdout.partition(":")[0])
    assert done.stdout.startswith(f"{path}: {path.stat().st_size:,} bytes; use it by -m ")
    assert path.read_bytes() == expected(home.parent, format)
    assert path.name in kept(home)
    assert not any("FP16" in name or "part" in name for name in kept(home) if name != path.name)
    return path


def fails(done: subprocess.CompletedProcess, *texts: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for text in texts:
        assert text in done.stderr


# ---- All is well ----


@pytest.mark.parametrize("format", [None, "FP32", "Q5_1", "q8_0"])
def test_pull(hub, home, pull, settings, format):
    option = ["--format", format] if format else []
    path = succeeds(pull(NAME, *option), home, (format or "FP16").upper())
    assert hub.log == ["HEAD model.pth", "GET model.pth 0-"]
    assert kept(home) == [path.name]

    again = pull(NAME, *option)  # nothing is asked of the network
    assert again.stdout.startswith(f"{path}: ")
    offline = settings | {"HF_HUB_OFFLINE": "1"}
    done = rwkv("generate", "A", "-n", 2, "-m", NAME, env=offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.log == ["HEAD model.pth", "GET model.pth 0-"]


def test_another_format_needs_no_download(hub, home, pull):
    succeeds(pull(NAME), home)
    done = pull(NAME, "--format", "Q4_0")
    assert done.returncode == 0
    assert Path(done.stdout.partition(":")[0]).read_bytes() == expected(home.parent, "Q4_0")
    assert hub.log == ["HEAD model.pth", "GET model.pth 0-"]


def test_row_of_the_registry(hub, home, pull, settings):
    row = ["Tiny", "169M", 256, "plain", "someone/tiny", "model.pth"]
    row.append(hashlib.sha256(CONTENT).hexdigest())
    for name in ("tiny", "someone/tiny", NAME, "model.pth"):
        path = succeeds(pull(name, rows=[row]), home)
        assert path.name == "Tiny-FP16.bin"
    assert len(hub.log) == 2
    shown = pull("--list", rows=[row]).stdout
    assert "\nTiny " in shown
    assert "  FP16\n" in shown


def test_hash_of_the_registry(hub, home, pull):
    """What the hub has under that name now is not what the table knows."""
    row = ["Tiny", "169M", 256, "plain", "someone/tiny", "model.pth", "0" * 64]
    fails(pull("Tiny", rows=[row]), "the hub has another file of that name", "expected " + "0" * 64)
    assert hub.log == ["HEAD model.pth"]
    assert kept(home) == []


def test_odd_file_name(hub, home, pull):
    succeeds(pull("hf:someone/tiny/100% other.pth"), home)
    assert hub.log == ["HEAD 100% other.pth", "GET 100% other.pth 0-"]


def test_model_file(hub, home, pull, tmp_path):
    done = pull("hf:someone/tiny/ready.bin")
    path = Path(done.stdout.partition(":")[0])
    assert path.read_bytes() == (tmp_path / "q.bin").read_bytes()
    assert path.name.endswith("-Q5_1.bin")
    assert kept(home) == [path.name]
    fails(pull("hf:someone/tiny/ready.bin", "--format", "Q4_0"), "Q5_1")


@pytest.mark.parametrize("format", ["FP16", "Q5_1"])
def test_url(hub, home, pull, format):
    succeeds(pull(f"{hub.store}/loose.pth", "--format", format), home, format)
    assert hub.log == ["HEAD loose.pth", "GET loose.pth 0-"]


def test_copy_of_the_hubs_client(hub, home, pull, settings):
    """What another program has fetched is used, and stays."""
    code = "import huggingface_hub as h; print(h.hf_hub_download('someone/tiny', 'model.pth'))"
    done = run([sys.executable, "-c", code], env=settings | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    copy = Path(done.stdout.strip())
    hub.log.clear()
    succeeds(pull(NAME, HF_HUB_OFFLINE="1"), home)
    assert hub.log == []
    assert copy.read_bytes() == CONTENT


def test_list(hub, home, pull):
    path = succeeds(pull(NAME, "--format", "Q5_1"), home, "Q5_1")
    shown = pull("--list").stdout
    for row in registry.ROWS:
        assert f"\n{row.name} " in shown
    assert f"\n{path.name.removesuffix('-Q5_1.bin')} " in shown
    assert f"kept in {home / 'models'}\n" in shown
    assert len(hub.log) == 2
    done = rwkv("generate", "A", "-n", 1, "-m", path.name.removesuffix("-Q5_1.bin"))
    assert "is no model" in done.stderr  # in another RWKV_HOME


# ---- Faults ----


@pytest.mark.parametrize(
    ("name", "faults", "starts"),
    [
        (NAME, "breaks_off breaks_off is_overloaded", "0 half rest rest"),
        (NAME, "says_nothing is_overloaded", "0 0 0"),
        (NAME, "breaks_off ignores_the_range", "0 half"),
        (NAME, "breaks_off sends_another_range", "0 half 0"),
        (NAME, "ends_early", "0 half"),
        ("URL", "breaks_off says_nothing", "0 half half"),
        ("URL", "ends_early ignores_the_range", "0 half"),
    ],
)
def test_interrupted(hub, home, pull, name, faults, starts):
    """N-01, N-02"""
    hub.faults = faults.split()
    succeeds(pull(f"{hub.store}/loose.pth" if name == "URL" else name), home)
    half = len(CONTENT) // 2
    offsets = {"half": half, "rest": half + (len(CONTENT) - half) // 2}
    file = "loose.pth" if name == "URL" else "model.pth"
    assert hub.log[1:] == [f"GET {file} {offsets.get(word, 0)}-" for word in starts.split()]


def test_continued_by_another_process(hub, home, pull):
    hub.faults = ["breaks_off", *["says_nothing"] * 4]
    fails(pull(NAME), "model.pth: ", "what came is kept, try again")
    (part,) = kept(home)
    assert part.endswith(".part")
    hub.log.clear()
    succeeds(pull(NAME), home)
    assert hub.log == ["HEAD model.pth", f"GET model.pth {len(CONTENT) // 2}-"]


@pytest.mark.parametrize("name", [NAME, "URL"])
def test_another_file_meanwhile(hub, home, pull, name):
    """What had come of the former file is not continued."""
    other = torch_zip(random_model(2, n_embed=32, n_layer=2))
    hub.files = {"someone/tiny": {"model.pth": other}, "": {"loose.pth": other}}
    address = f"{hub.store}/loose.pth" if name == "URL" else name
    hub.faults = ["breaks_off", *["says_nothing"] * 4]
    fails(pull(address))
    hub.files = {"someone/tiny": {"model.pth": CONTENT}, "": {"loose.pth": CONTENT}}
    succeeds(pull(address), home)
    assert hub.log[-1].endswith(" 0-")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("sends_html", "the server sent an HTML page instead of the file"),
        ("compresses", "came with the encoding gzip"),
        ("sends_too_much", f"more than its {len(CONTENT)} bytes came"),
    ],
)
def test_refused(hub, home, pull, fault, text):
    hub.faults = [fault]
    fails(pull(NAME), f"model.pth: {text}")
    succeeds(pull(NAME), home)


def test_never_complete(hub, home, pull):
    hub.faults = ["says_nothing"] * 5
    fails(pull(NAME), "model.pth: Server disconnected")
    assert hub.faults == []
    hub.faults = ["is_overloaded"] * 5
    fails(pull(NAME), "model.pth: the server answered 503; what came is kept, try again")


def test_wrong_hash(hub, home, pull):
    hub.claimed_sha256 = "1" * 64
    fails(pull(NAME), "SHA-256", "expected " + "1" * 64, "it is removed, try again")
    assert kept(home) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("page.pth", "page.pth: what came is an HTML page"),
        ("pointer.pth", "pointer.pth: what came is a git-lfs pointer"),
        ("empty.pth", "empty.pth: what came is empty"),
        ("foreign.pth", "RWKV-5.2; only RWKV-4 and 4a can be converted"),
        ("missing.pth", "has no file 'missing.pth', it has model.pth, 100% other.pth, "),
    ],
)
def test_not_the_file(hub, home, pull, file, text):
    fails(pull(f"hf:someone/tiny/{file}", "--format", "Q5_1"), text)
    assert [name for name in kept(home) if not name.endswith(".part")] == []


def test_other_errors(hub, home, pull, settings):
    fails(pull("hf:no/such/x.pth"), "there is no repository no/such at http://127.0.0.1")
    fails(pull(f"{hub.store}/none.pth"), "none.pth: ", "404")
    fails(pull(f"{hub.store}/empty.pth"), "what came is empty")
    fails(pull("nonsense"), "'nonsense' is no name of a model: 'rwkv pull --list' shows them")
    fails(pull("http://example.com/x.pth"), "expected an https address")
    fails(pull(NAME, "--format", "Q9"), "unknown format 'Q9' (choose from FP32, FP16, Q4_0")
    for arguments in ([], ["--list", "x"], ["--list", "--format", "Q5_1"]):
        assert pull(*arguments).returncode == 2
    assert not hub.log[3:]


@pytest.mark.parametrize("name", [NAME, "RWKV-4-169M", "https://localhost:9/x.pth"])
def test_offline(hub, home, pull, name):
    """N-05"""
    began = time.monotonic()
    fails(pull(name, HF_HUB_OFFLINE="1"), "from the network, which HF_HUB_OFFLINE forbids")
    assert hub.log == []
    fails(
        pull(name, HF_ENDPOINT="http://127.0.0.1:9"),
        "(no network? models that are at hand need none)",
    )
    assert time.monotonic() - began < 15
    assert kept(home) == []


def test_token_stays_with_the_hub(hub, home, pull, tmp_path):
    """The store, which is another host, does not get the hub's token."""
    seen = []
    answer = hub.handler.answer

    def record(handler):
        place = handler.path.split("/")[1]
        if place != "api":  # what the hub's client asks for itself
            seen.append((place, handler.headers.get("Authorization")))
        answer(handler)

    hub.handler.answer = record
    try:
        succeeds(pull(NAME), home)
    finally:
        hub.handler.answer = answer
    assert seen == [("someone", "Bearer hf_secret")] * 2 + [("store", None)]


def test_disk_space(hub, home, settings):
    program = """
import shutil
from rwkv_cpp import cli
shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 5000)
cli.main()
"""
    done = run([sys.executable, "-c", program, "pull", NAME], env=settings)
    fails(done, "has 0.0 GB free, ", " GB are needed", "set RWKV_HOME")
    assert hub.log == ["HEAD model.pth"]


# ---- Several at once ----


def test_two_at_once(hub, home, settings):
    hub.barrier = threading.Event()
    command = [*CONSOLE, "pull", NAME, "--format", "Q5_1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    runs = [subprocess.Popen(command, env=settings, **pipes) for _ in range(3)]
    _wait_for(lambda: len(hub.log) == 2)
    time.sleep(0.3)
    assert len(hub.log) == 2  # the others wait for the first
    hub.barrier.set()
    outputs = {run.communicate(timeout=60) for run in runs}
    ((out, err),) = outputs
    assert err == ""
    assert Path(out.partition(":")[0]).read_bytes() == expected(home.parent, "Q5_1")
    assert hub.log == ["HEAD model.pth", "GET model.pth 0-"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed(hub, home, settings, number):
    """N-04"""
    hub.barrier = threading.Event()
    process = subprocess.Popen(
        [*CONSOLE, "pull", NAME], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _wait_for(lambda: any(path.stat().st_size for path in home.rglob("*.part")))
    process.send_signal(number)
    assert process.wait(20) != 0
    out, err = process.communicate()
    assert out == b""
    assert b"Traceback" not in err
    hub.barrier.set()
    hub.barrier = None
    hub.log.clear()
    succeeds(rwkv("pull", NAME, env=settings), home)
    assert hub.log[0] == "HEAD model.pth"
    assert not hub.log[1].endswith(" 0-")


def _wait_for(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("waited in vain")
