"""lm-eval tasks without a network: questions with choices from a folder of JSONL files.

    DIR/arc_easy/test.jsonl     the questions asked (or validation.jsonl)
    DIR/arc_easy/train.jsonl    the examples shown before them; needed for --fewshot only (or validation.jsonl)

A line is {"query": text, "choices": [text, ...], "gold": index}; the query is the prompt, a choice follows after a
space. Where the choices stand inside the text and the same words follow, as in Winogrande, it is
{"queries": [text, ...], "continuation": text, "gold": index}.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oncelm.utils.settings import parse_json

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

ASKED, SHOWN = ("test", "validation"), ("train", "validation")


def check_folder(folder: str, names: Sequence[str], fewshot: int) -> None:
    """ValueError unless the folder has the splits that these tasks need."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"no folder of tasks at {folder}; recipes/eval_data.py builds one.")
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    if missing := [name for name in names if name not in there]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}; it has: {', '.join(there) or 'no task'}. --only A,B asks some tasks."
        )
    for name in names:
        _find(root / name, ASKED, "to ask")
        if fewshot:
            _find(root / name, SHOWN, f"for {fewshot} examples before each question")


def folder_task(folder: str, name: str, fewshot: int) -> ConfigurableTask:
    """The task `name` of a folder, with so many examples before each question.

    Raises:
        ValueError: no such folder, task or split; a line that is no question.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    check_folder(folder, [name], fewshot)
    place = Path(folder) / name
    asked = _find(place, ASKED, "to ask")
    shown = _find(place, SHOWN, "to show") if fewshot else None
    splits = {split: Dataset.from_list(read_questions(place / f"{split}.jsonl")) for split in {asked, shown} - {None}}
    inside = "queries" in splits[asked].column_names
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: splits,
            "test_split": asked,
            "fewshot_split": shown,
            "num_fewshot": fewshot,
            "output_type": "multiple_choice",
            "doc_to_text": (lambda doc: doc["gold"]) if inside else (lambda doc: doc["query"]),
            "doc_to_target": (lambda doc: doc["continuation"]) if inside else (lambda doc: doc["gold"]),
            "doc_to_choice": (lambda doc: doc["queries"]) if inside else (lambda doc: doc["choices"]),
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        }
    )


def _find(folder: Path, splits: tuple[str, ...], use: str) -> str:
    """The first of the splits that is there."""
    for split in splits:
        if (folder / f"{split}.jsonl").is_file():
            return split
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    wanted = " or ".join(f"{split}.jsonl" for split in splits)
    raise ValueError(f"{folder} lacks a split {use}: {wanted}; found: {there}.")


def read_questions(file: Path) -> list[dict[str, Any]]:
    """The questions of a file, checked."""
    questions: list[dict[str, Any]] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                question = parse_json(line)
                _check(question)
            except ValueError as error:
                raise ValueError(f"line {number} of {file} is no question: {error}") from None
            if questions and question.keys() != questions[0].keys():
                raise ValueError(f"line {number} of {file} has other keys than the first question.")
            questions.append(question)
    if not questions:
        raise ValueError(f"{file} holds no question.")
    return questions


def _check(question: Any) -> None:
    """ValueError unless it is of one of the two forms."""
    forms = {"query": "choices", "continuation": "queries"}
    text = next((key for key in forms if isinstance(question, dict) and key in question), None)
    if text is None or set(question) != {text, forms[text], "gold"}:
        raise ValueError("it must have the keys query, choices, gold, or queries, continuation, gold.")
    options, gold = question[forms[text]], question["gold"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(x, str) and x for x in options):
        raise ValueError(f"{forms[text]} must be a list of at least two texts.")
    if not isinstance(question[text], str) or not question[text]:
        raise ValueError(f"{text} must be a text.")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise ValueError(f"gold must be an index of {forms[text]}, 0 to {len(options) - 1}; got {gold!r}.")
