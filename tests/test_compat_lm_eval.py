"""compat/lm_eval: the answers to lm-eval's three questions, and lm-eval itself on local tasks.

Where the package is not installed, a base class without abilities stands in for its own.
"""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import environment
from rwkv_cpp import RWKV
from rwkv_cpp.tokenizer import first_token

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
with_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm_eval is not installed")
PLAYS = "ROMEO:\nIs the day so young?\n\nBENVOLIO:\nBut new struck nine."


@pytest.fixture(scope="module")
def compat():
    """The module, over the real package or over stand-ins."""
    if HAS_LM_EVAL:
        yield importlib.import_module("rwkv_cpp.compat.lm_eval")
        return
    registered = {}

    def register_model(*names):
        def register(kind):
            registered.update(dict.fromkeys(names, kind))
            return kind

        return register

    class LM:
        def __init__(self):
            self.cache_hook = SimpleNamespace(add_partial=lambda *arguments: None)

    fakes = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api")}
    fakes["lm_eval.api.model"] = SimpleNamespace(LM=LM)
    fakes["lm_eval.api.registry"] = SimpleNamespace(register_model=register_model)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fakes.items():
            patch.setitem(sys.modules, name, module)
        module = importlib.import_module("rwkv_cpp.compat.lm_eval")
        assert registered == {"rwkv-ggml": module.RWKVLM}
        yield module
    sys.modules.pop("rwkv_cpp.compat.lm_eval")


@pytest.fixture(scope="module")
def lm(compat):
    model = compat.RWKVLM(batch_size=2, n_threads=1)
    yield model
    model.model.free()


def asked(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in arguments]


def expected(model: RWKV, context: str, text: str) -> tuple[float, bool]:
    """Byte by byte, in float64; without a context the text follows the first token."""
    state = model.read(list(context.encode()) or [first_token(model.tokenizer)])
    total, greedy = 0.0, True
    for token in text.encode():
        logits = state.logits.astype(np.float64)
        total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        greedy = greedy and int(logits.argmax()) == token
        state = model.read([token], state)
    return total, greedy


def test_loglikelihood(lm):
    model = lm.model
    likeliest = model.generate("ROMEO", temperature=0, max_tokens=4).text
    pairs = [
        ("ROMEO", likeliest),
        ("ROMEO", ":\n"),
        ("ROMEO", "!"),
        ("", "JULIET:"),
        ("But soft, what ", "light"),
        ("But soft, what", " light"),
        ("   ", "x"),
    ]
    answers = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, text), (logprob, greedy) in zip(pairs, answers, strict=True):
        kept = context.rstrip()
        value, is_greedy = expected(model, kept, context[len(kept) :] + text)
        assert logprob == pytest.approx(value, abs=1e-4)
        assert greedy == is_greedy
    assert answers[0][1]
    assert not answers[2][1]
    assert answers[4] == answers[5]
    assert lm.loglikelihood(asked(("a", ""), ("a", "b"), ("c", "")), disable_tqdm=True) == [
        (0.0, True),
        lm.loglikelihood(asked(("a", "b")), disable_tqdm=True)[0],
        (0.0, True),
    ]
    assert lm.loglikelihood([], disable_tqdm=True) == []


def test_loglikelihood_rolling(lm):
    texts = [PLAYS, "a", "", PLAYS * 20]
    answers = lm.loglikelihood_rolling(asked(*((text,) for text in texts)), disable_tqdm=True)
    for text, answer in zip(texts[:3], answers, strict=False):
        assert answer == pytest.approx(expected(lm.model, "", text)[0], abs=1e-3)
    assert answers[3] == lm.model.score(PLAYS * 20).total


def test_generate_until(lm):
    greedy = {"until": ["\n"], "max_gen_toks": 12}
    asks = [("ROMEO:\n", greedy), ("JULIET:\n", greedy), ("Second Citizen:\n", greedy)]
    asks.append(("ROMEO:\n", {"until": "e", "do_sample": False, "temperature": 0.7}))
    asks.append(("", {"max_gen_toks": 3}))
    asks.append(("ROMEO:\n", {"temperature": 0.9, "top_p": 0.8, "seed": 3, "max_gen_toks": 9}))
    answers = lm.generate_until(asked(*asks), disable_tqdm=True)
    options = [{"stop": "\n", "max_tokens": 12, "temperature": 0}] * 3
    options.append({"stop": "e", "max_tokens": 256, "temperature": 0})
    options.append({"max_tokens": 3, "temperature": 0})
    options.append({"max_tokens": 9, "temperature": 0.9, "top_p": 0.8, "seed": 3})
    alone = [
        lm.model.generate(prompt, **each).text
        for (prompt, _), each in zip(asks, options, strict=True)
    ]
    assert answers == alone
    assert not any("\n" in answer for answer in answers[:3])
    with pytest.raises(TypeError, match="num_beans"):
        lm.generate_until(asked(("a", {"num_beans": 3})), disable_tqdm=True)


def test_the_cache_hears_of_every_answer(lm, monkeypatch):
    heard = []
    hook = SimpleNamespace(add_partial=lambda *arguments: heard.append(arguments))
    monkeypatch.setattr(lm, "cache_hook", hook)
    (answer,) = lm.loglikelihood(asked(("a", "b")), disable_tqdm=True)
    assert heard == [("loglikelihood", ("a", "b"), answer)]


def test_arguments(compat, lm):
    assert compat.RWKVLM(lm.model, batch_size="16", device="cuda:0").batch_size == 16
    for wrong in ("auto", 0, -1, "1.5"):
        with pytest.raises(ValueError, match="batch_size"):
            compat.RWKVLM(lm.model, batch_size=wrong)


def test_without_the_package():
    code = "import sys; sys.modules['lm_eval'] = None; import rwkv_cpp.compat.lm_eval"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert "pip install 'rwkv-ggml[eval]'" in done.stderr


# ---- lm-eval itself -----------------------------------------------------------------------------

QUESTIONS = [
    {"question": "Who loves Juliet?", "choices": ["ROMEO", "KING RICHARD III"], "answer": 0},
    {"question": "To be, or not to", "choices": ["zq#", "be"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{rest}
"""
TASKS = {
    "plays_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
""",
    "plays_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
""",
    "plays_writing": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with local tasks; no network is asked."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    for name, rest in TASKS.items():
        text = TASK.format(name=name, data=data, rest=rest)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    return tmp_path / "tasks"


@with_lm_eval
def test_lm_eval(tmp_path, tasks, lm):
    command = [sys.executable, "-m", "rwkv_cpp.compat.lm_eval", "run", "--model", "rwkv-ggml"]
    command += ["--model_args", "n_threads=1", "--include_path", tasks, "--tasks", ",".join(TASKS)]
    command += ["--output_path", tmp_path / "out.json", "--batch_size", "4"]
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment(**offline)
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out*.json")
    results = json.loads(path.read_text())["results"]

    right = 0
    for each in QUESTIONS:
        texts = [f" {choice}" for choice in each["choices"]]
        right += lm.model.choose(each["question"], texts).index == each["answer"]
    assert results["plays_choice"]["acc,none"] == right / len(QUESTIONS)
    total = sum(lm.model.score(each["question"]).total for each in QUESTIONS)
    size = sum(len(each["question"]) for each in QUESTIONS)
    bits = -total / size / np.log(2)
    assert results["plays_rolling"]["bits_per_byte,none"] == pytest.approx(bits)
    assert results["plays_writing"]["exact_match,none"] == 0
