"""The papers' tables from a folder: figures, resuming, limits, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from oncelm.cli import main
from oncelm.eval import TASKS, make_task, read_run, run, write_report
from oncelm.eval.harness import hub
from oncelm.eval.harness.scoring import score_requests
from tests.eval.harness.conftest import write

BOTH = "arc_easy,winogrande"


def table(questions, **options):
    return make_task(TASKS["yoco-table"], data=str(questions), **{"only": BOTH, **options})


def samples(done) -> list:
    """What was found, times aside."""
    return [{k: v for k, v in s.items() if k not in ("seconds", "check")} for _, s in sorted(done.samples.items())]


@pytest.mark.parametrize("fewshot", [0, 2])
def test_equals_hflm(language_models, questions, tmp_path, fewshot) -> None:
    pytest.importorskip("peft")
    model = language_models("retention")
    found = [
        run(table(questions, fewshot=fewshot, scorer=scorer), model, tmp_path / f"{scorer}.jsonl")
        for scorer in ("oncelm", "hflm")
    ]
    assert len(found[0].samples) == 9 + 6
    assert found[0].complete
    for mine, theirs in zip(*map(samples, found), strict=True):
        likely, expected = (s["scores"].pop("log_likelihoods") for s in (mine, theirs))
        assert likely == pytest.approx(expected, abs=1e-4)
        assert mine == theirs


def test_a_killed_run_goes_on(language_models, questions, tmp_path, monkeypatch) -> None:
    """A run that stops in its second task, a limited one, then the rest: the same lines as in one go."""
    model, calls = language_models("window"), []
    whole = run(table(questions), model, tmp_path / "whole.jsonl")
    out = tmp_path / "cut.jsonl"

    def fails_later(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_requests(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("oncelm.eval.harness.adapter.score_requests", fails_later)
        with pytest.raises(KeyboardInterrupt):
            run(table(questions), model, out)
    assert len(read_run(out).samples) == 9
    assert len(run(table(questions), model, out, limit=2).samples) == 9 + 2
    done = run(table(questions), model, out)
    assert samples(done) == samples(whole)
    assert done.complete


def test_out_of_memory_is_an_error_of_one_line(language_models, questions, tmp_path, monkeypatch) -> None:
    def too_much(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("oncelm.eval.harness.adapter.score_requests", too_much)
    with pytest.raises(ValueError, match=r"out of memory at questions of arc_easy of up to \d+ tokens"):
        run(table(questions), language_models("retention"), tmp_path / "r.jsonl")


def test_changed_questions_are_noticed(language_models, questions, tmp_path) -> None:
    model, out = language_models("retention"), tmp_path / "r.jsonl"
    run(table(questions), model, out, limit=3)
    file = questions / "arc_easy/test.jsonl"
    file.write_text(file.read_text().replace("What is 1 and 1", "How much is 1 and 1"))
    with pytest.raises(ValueError, match="sample 1 has another prompt"):
        run(table(questions), model, out)


def test_text_beyond_the_model(language_models, questions, tmp_path) -> None:
    model = language_models("retention")
    write(questions / "arc_easy/test.jsonl", [{"query": "x" * 5000, "choices": ["a", "b"], "gold": 0}])
    with pytest.raises(ValueError, match="longer than retention was made for"):
        run(table(questions), model, tmp_path / "r.jsonl")
    done = run(table(questions), model, tmp_path / "l.jsonl", beyond_trained_length=True)
    assert len(done.samples) == 1 + 6


def test_command_and_report(questions, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data", str(questions), "--only", BOTH, "--tokenizer", "bytes", "--device", "cpu", "--fewshot", "1"]
    (questions / "winogrande/train.jsonl").write_bytes((questions / "winogrande/validation.jsonl").read_bytes())
    assert main(["eval", "yoco-table", "yoco-tiny", *options]) == 0
    shown = capsys.readouterr().out
    assert "YOCO-3B-1M" in shown
    assert "0.651" in shown  # Winogrande, as published
    done = read_run("runs/eval/yoco-table-yoco-tiny.jsonl")
    line = done.samples[0]
    assert line["target"] == "0"
    assert line["output"] in (" 0", " a lot")
    (view,) = TASKS["yoco-table"].views([done])
    assert view.rows[-1][:2] == ["average", ""]  # not all the columns are there
    write_report([done], "report.html")
    assert "YOCO-3B-1M" in (tmp_path / "report.html").read_text()


def test_the_average_is_the_published_one() -> None:
    """Each published row's average is the mean of its columns, as ours will be."""
    for name, slack in (("yoco-table", 0.0006), ("longllama-table", 0.005)):
        task = TASKS[name]
        for label, row in task.published.items():
            assert len(row) == len(task.columns) + 1
            assert sum(row[:-1]) / len(task.columns) == pytest.approx(row[-1], abs=slack), label


def test_any_tasks(language_models, questions, tmp_path) -> None:
    task = make_task(TASKS["harness"], data=str(questions), only="arc_easy")
    done = run(task, language_models("retention"), tmp_path / "r.jsonl")
    (view,) = task.views([done])
    assert view.header == ["model", "task", "samples", "acc", "acc_norm"]


@pytest.fixture
def few_tasks(monkeypatch) -> None:
    """Those of one folder: to list all of lm-eval's takes ten seconds."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / "arc"
    manager = tasks.TaskManager(include_defaults=False, include_path=folder)
    monkeypatch.setattr(hub, "_task_manager", lambda: manager)


@pytest.mark.usefixtures("few_tasks")
def test_lm_evals_own_task(language_models, tmp_path, monkeypatch) -> None:
    """As from the hub: lm-eval's own prompts and choice of examples."""
    import datasets

    rows = [
        {"question": f"What is {i}?", "choices": {"text": ["x", "yy", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"}
        for i in range(4)
    ]
    split = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict(train=split, test=split))
    task = make_task(TASKS["yoco-table"], only="arc_easy", fewshot=2)
    done = run(task, language_models("retention"), tmp_path / "r.jsonl")
    assert [line["target"] for line in done.samples.values()] == ["yy"] * 4
    shown = len("Question: What is 0?\nAnswer: yy\n\n")  # bytes are tokens
    assert done.samples[0]["prompt_tokens"] == 3 * shown - 2


@pytest.mark.slow
def test_the_tables_tasks_are_lm_evals() -> None:
    known = set(hub._task_manager().all_tasks)
    for name in ("yoco-table", "longllama-table"):
        assert {task for _, task, _ in TASKS[name].columns} <= known


@pytest.mark.usefixtures("few_tasks")
def test_no_network(language_models, tmp_path, monkeypatch) -> None:
    import datasets

    def offline(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"cannot load the data of arc_easy \(no route\).*--data"):
        run(make_task(TASKS["harness"], only="arc_easy"), language_models("retention"), tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="unknown task of lm-eval 'arc_eesy'; did you mean 'arc_easy'"):
        run(make_task(TASKS["harness"], only="arc_eesy"), language_models("retention"), tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match="unknown task of lm-eval 'qqqqqqqq'; `lm-eval ls tasks` lists them all"):
        run(make_task(TASKS["harness"], only="qqqqqqqq"), language_models("retention"), tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "arc_esy"}, "did you mean 'arc_easy'"),
        ({"only": ""}, "lacks arc_challenge, boolq, hellaswag, openbookqa, piqa, sciq; it has: arc_easy, winogrande"),
        ({"scorer": "vllm"}, "unknown scorer"),
        ({"fewshot": -1}, "fewshot must be a whole number of at least 0"),
        ({"data": "nowhere"}, "no folder of tasks at nowhere"),
    ],
)
def test_wrong_options(questions, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(TASKS["yoco-table"], **{"data": str(questions), "only": BOTH, **options})


def test_missing_split(questions) -> None:
    (questions / "arc_easy/test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lacks a split to ask: test.jsonl or validation.jsonl; found: train.jsonl"):
        table(questions)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 10 of .* is no question: Expecting"),
        (json.dumps({"query": "a", "choices": ["b", "c"], "gold": 2}), "gold must be an index of choices, 0 to 1"),
        (json.dumps({"query": "a", "choices": ["b"], "gold": 0}), "at least two texts"),
        (json.dumps({"query": "a", "choices": ["b", "c"]}), "must have the keys"),
        (json.dumps({"queries": ["a", "d"], "continuation": "b", "gold": 0}), "other keys than the first"),
    ],
)  # fmt: skip
def test_damaged_questions(language_models, questions, tmp_path, line, message) -> None:
    with (questions / "arc_easy/test.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        run(table(questions), language_models("retention"), tmp_path / "r.jsonl")
