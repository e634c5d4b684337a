"""`oncelm eval` from the command line to the report; the documentation's code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oncelm.cli import main
from oncelm.eval import TASKS, read_run
from oncelm.models.compiling import CompilesLayers

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tests.eval.conftest import build

    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = build("retention")
    model.model.save_pretrained(folder)
    model.codec.tokenizer.save_pretrained(folder)
    return folder


def evaluate(*arguments: object) -> int:
    return main(["eval", *map(str, arguments)])


def test_a_task_and_a_report(folder, tmp_path, capsys, haystack, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--lengths", "300,400", "--depths", 2, "--runs", 1, "--haystack", haystack, "--device", "cpu"]
    assert evaluate("needle", folder, *options) == 0
    assert "share found, by length" in capsys.readouterr().out
    out = tmp_path / "runs/eval/needle-tiny.jsonl"
    assert len(read_run(out).samples) == 4
    assert evaluate("needle", folder, *options) == 0
    assert evaluate("nll", folder, "--documents", haystack, "--max-tokens", 200, "--device", "cpu") == 0
    assert evaluate("report", out, out.with_name("nll-tiny.jsonl"), "--out", "report.html", "--png", "figures") == 0
    assert "tiny" in (tmp_path / "report.html").read_text()
    assert len(list((tmp_path / "figures").glob("*.png"))) == 3


def test_a_preset_and_a_limit(tmp_path, capsys) -> None:
    options = [
        "--tokenizer",
        "bytes",
        "--lengths",
        "600",
        "--limit",
        2,
        "--out",
        tmp_path / "p.jsonl",
        "--device",
        "cpu",
    ]
    assert evaluate("passkey", "yoco-tiny", *options) == 0
    assert "weights are random" in capsys.readouterr().err
    assert len(read_run(tmp_path / "p.jsonl").samples) == 2


@pytest.mark.parametrize("model", ["yoco-tiny", "folder"])
def test_compile_reaches_the_model(model, folder, tmp_path, monkeypatch, haystack) -> None:
    asked = []
    monkeypatch.setattr(CompilesLayers, "compile_layers", lambda model, enabled=True: asked.append(enabled) or model)
    name, *tokenizer = (folder,) if model == "folder" else (model, "--tokenizer", "bytes")
    options = ["--documents", haystack, "--max-tokens", 50, "--out", tmp_path / "nll.jsonl", "--device", "cpu"]
    assert evaluate("nll", name, *tokenizer, *options, "--compile") == 0
    assert asked == [True]


@pytest.mark.parametrize("task", [None, *TASKS, "report"])
def test_help_teaches(task, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate(*([] if task is None else [task]), "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    if task is None:
        assert all(name in shown for name in TASKS)
    elif task != "report":
        for name, *_ in TASKS[task].option_fields():
            assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neadle", "x"], "unknown task 'neadle'; did you mean 'needle'?"),
        (["no.py", "x"], "task file 'no.py' does not exist"),
        ([], "the following arguments are required: TASK, MODEL"),
        (["needle"], "required: MODEL"),
        (
            ["needle", "x", "--length", "4K,"],
            "--lengths: must be a whole number above 0, such as 20, 4096 or 128K; got ''",
        ),
        (["needle", "x", "--depht", "3"], "did you mean '--depths'"),
        (["needle", "MODEL", "--depths", "0"], "--depths: must be a whole number above 0"),
        (["needle", "no/such/model/anywhere"], "no model folder at"),
        (["needle", "MODEL", "--lengths", "8K"], "8,192 tokens is longer than tiny was made for (4,096"),
        (["needle", "MODEL", "--lengths", "100"], "no room for a haystack"),
        (["needle", "MODEL", "--lengths", "600", "--haystack", "no/such"], "unknown text 'no/such'"),
        (["needle", "MODEL", "--limit", "-1"], "limit must be"),
        (["needle", "MODEL", "--out", "."], "--out . is a folder"),
        (["longppl", "MODEL"], "needs a folder of questions: --data DIR"),
        (["needle", "yoco-tiny"], "has no tokenizer; name one"),
        (["needle", "yoco-tiny", "--tokenizer", "bytes", "--memory", "cpu"], "--memory is for LongLLaMA models"),
        (["needle", "MODEL", "--memory", "cpu"], "--memory is for LongLLaMA models"),
        (["report"], "required: FILE"),
        (["report", "no.jsonl"], "No such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert evaluate(*(folder if argument == "MODEL" else argument for argument in arguments)) == 2
    shown = capsys.readouterr().err
    errors = [line for line in shown.replace("\r", "\n").splitlines() if line.startswith("oncelm: error: ")]
    assert len(errors) == 1
    assert message in errors[0]


# -- the documentation ------------------------------------------------------------------------------------------------


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)


def test_the_documented_task_runs(folder, tmp_path, capsys) -> None:
    (code,) = [block for block in blocks() if block.startswith("# repeat_words.py")]
    assert len(code.splitlines()) <= 50
    (tmp_path / "repeat_words.py").write_text(f"from __future__ import annotations\n\n{code}")
    out = tmp_path / "copy.jsonl"
    options = ("--words", 3, "--samples", 2, "--device", "cpu", "--out", out)
    assert evaluate(tmp_path / "repeat_words.py", folder, *options) == 0
    done = read_run(out)
    assert done.complete
    assert [set(s["scores"]) for s in done.samples.values()] == [{"exact", "words_right"}] * 2
    assert evaluate("report", out, "--out", tmp_path / "r.html") == 0
    (tmp_path / "two.py").write_text(code + "\nOther = Copy\nclass Third(Copy):\n    pass\n")
    capsys.readouterr()
    assert evaluate(tmp_path / "two.py", folder) == 2
    assert "must define one task" in capsys.readouterr().err


def test_the_documented_python_runs(tmp_path, monkeypatch) -> None:
    (code,) = [block for block in blocks() if "write_report" in block]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "report.html").exists()


def test_every_task_is_documented() -> None:
    text = DOCS.read_text()
    assert all(f"`{name}`" in text for name in TASKS)
