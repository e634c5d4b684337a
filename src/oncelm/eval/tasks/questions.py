"""Questions about long documents, from the public formats of GovReport, QMSum, Qasper and NarrativeQA.

A folder holds one file a data set, named for it: `gov_report.jsonl`, `qmsum.jsonl`, `qasper.json`, `narrativeqa.jsonl`
(any name that contains one of DATASETS; NarrativeQA's own release is its folder of `qaps.csv` and `tmp/*.content`).
Each file may be in LongBench's form, SCROLLS' or ZeroSCROLLS', or in the data set's own.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oncelm.data.folder import LeftOut, list_folder
from oncelm.eval.documents import read_utf8
from oncelm.utils.settings import parse_json

logger = logging.getLogger(__name__)

# how a file's name says what it is: (part of the name, data set)
DATASETS = (
    ("gov_report", "GovReport"),
    ("govreport", "GovReport"),
    ("qmsum", "QMSum"),
    ("qasper", "Qasper"),
    ("narrative_qa", "NarrativeQA"),
    ("narrativeqa", "NarrativeQA"),
)


@dataclass(frozen=True)
class Question:
    """`question` is "" where the answer is a summary of the document."""

    dataset: str
    document: str
    question: str
    answer: str


def read_questions(folder: str) -> list[Question]:
    """All questions of a folder, those about one document together, in the files' order.

    Raises:
        ValueError: no file of a known data set, a file or a line in no known form, a question without an answer.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"data {folder!r} is no folder; it must hold files such as gov_report.jsonl or qasper.json.")
    found: list[Question] = []
    listing = list_folder(root, (".jsonl", ".json", ".csv"))
    unknown = []
    for file in listing.files:
        name = file.name.lower() if file.name != "qaps.csv" else "narrativeqa.csv"
        dataset = next((dataset for part, dataset in DATASETS if part in name), None)
        if dataset:
            found += _grouped(_read_file(file, dataset))
        else:
            unknown.append(LeftOut(file, "of no known data set"))
    # NarrativeQA's stories are read with its questions
    unread = (one for one in listing.left_out if one.path.suffix != ".content")
    listing = replace(listing, left_out=(*unread, *unknown))
    if found and listing.left_out:
        logger.warning("%s", listing.describe())
    if not found:
        raise ValueError(
            f"folder {folder!r} holds no file of a known data set: a name must contain one of "
            f"{', '.join(part for part, _ in DATASETS)} and end in .jsonl or .json."
        )
    return found


def _grouped(questions: Iterator[Question]) -> list[Question]:
    """Questions about one document together."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.document, []).append(question)
    return [question for group in groups.values() for question in group]


def _read_file(file: Path, dataset: str) -> Iterator[Question]:
    if file.suffix == ".csv":
        yield from _narrative_qa(file)
        return
    text = read_utf8(file)
    if file.suffix == ".json":
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        records = list(content.values()) if isinstance(content, dict) else content
        if not isinstance(records, list):
            raise ValueError(f"{file} must be a list of records, or an object of them by name, is: {content!r:.60}.")
        lines = [(f"entry {number} of {file}", record) for number, record in enumerate(records, start=1)]
    else:
        lines = [(f"line {n} of {file}", _json(line, n, file)) for n, line in enumerate(text.split("\n"), 1) if line]
    for where, record in lines:
        yield from _checked(_read_record(record, dataset, where), where)


def _checked(questions: Iterator[Question], where: str) -> list[Question]:
    """The questions of one record; ValueError naming it if it lacks an inner key or an answer."""
    try:
        found = list(questions)
    except KeyError as error:
        raise ValueError(f"{where} lacks the key {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not in the form that its keys say: {error}.") from error
    for question in found:
        if not isinstance(question.answer, str) or not question.answer.strip():
            asked = f" to {question.question!r:.60}" if question.question else ""
            raise ValueError(f"{where} has an empty answer{asked}: {question.answer!r}.")
    return found


def _json(line: str, number: int, file: Path) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {file} is not JSON: {error}") from error


def _read_record(record: Any, dataset: str, where: str) -> Iterator[Question]:
    keys = set(record) if isinstance(record, dict) else set()
    if {"context", "answers"} <= keys:  # LongBench
        question = "" if dataset == "GovReport" else record.get("input", "")
        answers = record["answers"]
        if not answers:
            raise ValueError(f"{where} has no answer.")
        yield Question(dataset, record["context"], question, answers if isinstance(answers, str) else answers[0])
    elif {"input", "output"} <= keys:  # SCROLLS, ZeroSCROLLS
        yield _scrolls(record, dataset, where)
    elif {"report", "summary"} <= keys:
        yield Question(dataset, record["report"], "", record["summary"])
    elif {"meeting_transcripts", "specific_query_list"} <= keys:
        turns = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in record["meeting_transcripts"])
        for query in (*record.get("general_query_list", ()), *record["specific_query_list"]):
            yield Question(dataset, turns, query["query"], query["answer"])
    elif {"full_text", "qas"} <= keys:
        yield from _qasper(record, dataset)
    else:
        raise ValueError(
            f"{where} is in no known form; its keys are {sorted(keys)}. Known: context + answers (LongBench), input + "
            "output (SCROLLS), report + summary (GovReport), meeting_transcripts (QMSum), full_text + qas (Qasper)."
        )


def _scrolls(record: dict[str, Any], dataset: str, where: str) -> Question:
    text, answer = record["input"], record["output"]
    if not answer:
        raise ValueError(f"{where} has no output: this split is published without answers; use the validation split.")
    if "document_start_index" in record:
        document = text[record["document_start_index"] : record["document_end_index"]]
        question = text[record["query_start_index"] : record["query_end_index"]]
        return Question(dataset, document.strip(), "" if dataset == "GovReport" else question.strip(), answer)
    if dataset == "GovReport":
        return Question(dataset, text, "", answer)
    question, _, document = text.partition("\n\n")
    return Question(dataset, document, question, answer)


def _qasper(paper: dict[str, Any], dataset: str) -> Iterator[Question]:
    sections = "\n\n".join(
        "\n".join([section["section_name"] or "", *section["paragraphs"]]) for section in paper["full_text"]
    )
    document = f"{paper['title']}\n\n{paper['abstract']}\n\n{sections}"
    for question in paper["qas"]:
        for given in question["answers"][:1]:
            answer = given["answer"]
            if answer.get("unanswerable"):
                continue
            yes_no = {True: "Yes", False: "No"}.get(answer.get("yes_no"), "")
            text = answer.get("free_form_answer") or ", ".join(answer.get("extractive_spans") or ()) or yes_no
            if text:
                yield Question(dataset, document, question["question"], text)


def _narrative_qa(file: Path) -> Iterator[Question]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            yield from _checked(_of_story(row, file.parent / "tmp"), f"line {rows.line_num} of {file}")


def _of_story(row: dict[str, str], stories: Path) -> Iterator[Question]:
    story = stories / f"{row['document_id']}.content"
    if story.is_file():  # the release comes without the stories; those that were fetched are used
        text = story.read_text(encoding="utf-8-sig", errors="replace")
        yield Question("NarrativeQA", text, row["question"], row["answer1"])
