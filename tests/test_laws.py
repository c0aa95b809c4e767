"""Who may know whom: what is included and imported, floor by floor, and what leaves the library."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rwkv_cpp
from rwkv_cpp import load_rwkv_shared_library

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rwkv" / "rwkv_cpp"
GGML = sorted(path for path in (ROOT / "ggml").iterdir() if path.suffix in (".c", ".cpp", ".h"))
CORE = sorted(
    path for kind in ("*.cpp", "*.h", "arch/*.cpp", "arch/*.h") for path in ROOT.glob(kind)
)
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(
    path for folder in ("benchmarks", "docs", "examples") for path in (ROOT / folder).glob("*.py")
)

# A file or module knows only floors below its own; a new one gets its place here.
CORE_FLOORS = [
    {"rwkv.h"},
    {"rwkv_error.h"},
    {"file.h"},
    {"buffer.h"},
    {"ggml.h"},
    {"team.h"},
    {"model_file.h"},
    {"arch.h"},
    {"rwkv4.h"},
    {"adapter.h", "quantize_file.h"},
]
FLOORS = [
    {"errors", "progress", "registry", "terminal"},
    {"archive", "atomic", "choosing", "library", "philox", "pickles", "weights"},
    {"formats", "ggmf", "tokenizer"},
    {"checkpoint", "fingerprint", "grammar", "texts"},
    {"export", "lora", "sampling", "state_layouts", "token_data"},
    {"model"},
    {"scoring"},
    {"target_size"},
    {"sampling_options", "state", "styles"},
    {"prefix_cache"},
    {"convert", "merge_lora", "prepare_data", "quantize", "rescale", "upgrade"},
    {"download", "models", "train"},
    {"load_options"},
    {"info", "perplexity"},
    {"bench", "importance", "pull"},
    {"compare", "reading", "stopping"},
    {"embedding", "generation"},
    {"beam"},
    {"rwkv"},
    {"compat", "embed", "generate"},
    {"conversation"},
    {"conversation_store"},
    {"chat_commands"},
    {"chat", "rwkv_cpp_model", "rwkv_cpp_shared_library", "rwkv_world_tokenizer"},
    {"cli"},
    {"__main__"},
]
ONLY_IN = {
    "ctypes": {"library"},
    "torch": {"train"},
    "matplotlib": {"bench", "compare", "train"},
    "tokenizers": {"tokenizer"},
    "huggingface_hub": {"download", "tokenizer"},
    "llguidance": {"grammar"},
    "lm_eval": {"compat"},
    "pickle": set(),
}


def code(path: Path) -> str:
    """C without its comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text("utf-8"), flags=re.S)


def includes(path: Path) -> set[str]:
    """Headers of our own."""
    return {Path(name).name for name in re.findall(r'#\s*include\s+"(.*?)"', code(path))}


# ---- C ----


@pytest.mark.parametrize("path", GGML, ids=lambda path: path.name)
def test_ggml_knows_no_model(path):
    assert not re.search(r"rwkv|n_layer|n_vocab|n_embed|token", code(path), re.IGNORECASE)
    assert includes(path) <= {other.name for other in GGML}


@pytest.mark.parametrize("path", GGML, ids=lambda path: path.name)
def test_instructions_of_one_kind_of_cpu_stay_in_its_kernels(path):
    if not re.search(r"_(sse2|avx2|avx512(bf16)?|amx|neon)$", path.stem):
        assert not re.search(r"\b__m(128|256|512)|\bv(ld1|fma|dot)q", code(path))


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_includes_from_below(path):
    floors = [i for i, names in enumerate(CORE_FLOORS) if f"{path.stem}.h" in names]
    if path.name == "rwkv.cpp":
        floors = [len(CORE_FLOORS)]
    own = {f"{path.stem}.h"} if path.suffix == ".cpp" else set()
    assert includes(path) <= set().union(own, *CORE_FLOORS[: floors[0]])


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_leaves_the_cpu_to_ggml(path):
    text = code(path)
    assert not re.search(r"\bblock_q\d|_mm\d*_|__(AVX|SSE|ARM|x86_64|aarch64)", text)
    assert not re.search(r"\b(abort|exit|assert)\s*\(", text)


def test_header_needs_nothing_else():
    headers = re.findall(r"#\s*include\s*(\S+)", code(ROOT / "rwkv.h"))
    assert headers == ["<stdbool.h>", "<stddef.h>", "<stdint.h>"]


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("nm"), reason="needs nm and an ELF library"
)
def test_only_the_api_leaves_the_library():
    path = load_rwkv_shared_library().path
    table = subprocess.run(
        ["nm", "-D", "--defined-only", path], check=True, capture_output=True, text=True
    ).stdout
    symbols = {line.split()[-1] for line in table.splitlines()}
    header = (ROOT / "rwkv.h").read_text("utf-8")
    assert symbols == set(re.findall(r"RWKV_API [^;(]*?(rwkv_\w+)\(", header))


# ---- Python ----


def module_name(path: Path) -> str:
    """The name on a floor: a package inside ours has one place."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of ours, top-level packages of others)."""
    ours, others = set(), set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            ours |= {name.partition(".")[0] for name in names}
    return ours - {"__version__"}, others


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_from_below(path):
    name = module_name(path)
    ours, others = imports(path)
    assert "rwkv_cpp" not in others  # the package's own modules are imported relatively
    if name != "__init__":
        (floor,) = [i for i, names in enumerate(FLOORS) if name in names]
        assert ours <= set().union(*FLOORS[:floor])
    for package, homes in ONLY_IN.items():
        assert package not in others or name in homes


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_a_library_does_not_do(path):
    """No assert that -O takes away, nothing that runs a file's content, no printing."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "print", "pickle.load", "pickle.loads"}, called
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node)


def test_public_names():
    assert sorted(rwkv_cpp.__all__) == sorted(rwkv_cpp._HOMES)
    for name in rwkv_cpp.__all__:
        assert getattr(rwkv_cpp, name).__name__ == name
        assert name in dir(rwkv_cpp)
    with pytest.raises(AttributeError, match="nonsense"):
        rwkv_cpp.nonsense  # noqa: B018


def names_in(path: Path) -> set[str]:
    """What a module's file binds at its top level."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_import_what_there_is(path):
    """Benchmarks are run by hand only: what they use must not go unnoticed."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("rwkv_cpp"):
            continue
        home = PACKAGE.joinpath(*node.module.split(".")[1:])
        known = names_in(home / "__init__.py" if home.is_dir() else home.with_suffix(".py"))
        if home.is_dir():
            known |= {each.stem for each in home.glob("*.py")}
        if home == PACKAGE:
            known |= set(rwkv_cpp.__all__)
        assert {alias.name for alias in node.names} <= known, node.module


def test_entry_points_hold_no_logic():
    for path in (ROOT / "rwkv").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert len(tree.body) <= 4, path.name
        assert not any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree)), path.name
