"""Learning from as many examples as fit into the prompt: TREC and WebQuestions, as LongLLaMA is measured."""

from __future__ import annotations

import ast
import json
import logging
import re
import string
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from oncelm.eval.documents import read_utf8
from oncelm.eval.examples import Example, Generate, Output, Scores
from oncelm.eval.fields import LENGTH, SHARE, Kinds
from oncelm.eval.papers import TREC, WEBQS
from oncelm.eval.results import Run
from oncelm.eval.task import Task, option
from oncelm.eval.views import Curves, View, by_column, group, tokens
from oncelm.utils.settings import parse_json

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec

logger = logging.getLogger(__name__)

SUFFIXES = (".label", ".jsonl", ".json", ".txt", ".tsv")


@dataclass(frozen=True)
class Item:
    """A question and all its right answers; the first is the one to show."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class InContext(Task):
    """Each trial shuffles the training split into a prompt of demonstrations, read once for all its questions."""

    data: str = option("", "folder with a file of the training split and one of the test split")
    lengths: tuple[int, ...] = option((2048, 4096, 6144, 8192), "tokens of prompt and answer at most")
    trials: int = option(20, "choices of demonstrations at each length")
    questions: int = option(100, "test questions of a trial, drawn at random")
    max_new_tokens: int = option(20, "tokens of the answer; it ends with the line")

    tag_kinds: ClassVar[Kinds] = {"context_length": LENGTH}
    score_kinds: ClassVar[Kinds] = {"correct": SHARE}
    form: ClassVar[str]  # of a question, up to its answer
    published: ClassVar[dict[str, dict[int, float]]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError(f"{self.name} needs a folder of data: --data DIR.")

    @abstractmethod
    def read(self, file: Path) -> list[Item]:
        """The items of one split's file."""

    def examples(self, codec: Codec, seed: int) -> Iterator[Example]:
        files = [find_split(self.data, split) for split in ("train", "test")]
        train, test = map(self.read, files)
        shown = [codec.encode(self.form.format(item.question) + f" {item.answers[0]}\n\n") for item in train]
        asked = [codec.encode(self.form.format(item.question)) for item in test]
        count, longest = min(self.questions, len(test)), max(map(len, asked))
        for length in self.lengths:
            room = length - longest - self.max_new_tokens - len(codec.prefix)
            for trial in range(self.trials):
                random = np.random.default_rng([seed, length, trial])
                demonstrations, used = [codec.prefix], 0
                for i in random.permutation(len(train)):
                    if used + len(shown[i]) > room:
                        break
                    demonstrations.append(shown[i])
                    used += len(shown[i])
                if len(demonstrations) == 1:
                    raise ValueError(f"a context of {length} tokens has no room for a demonstration.")
                tags = {"context_length": length, "trial": trial, "demonstrations": len(demonstrations) - 1}
                for i in random.choice(len(test), count, replace=False):
                    prompt = np.concatenate([*demonstrations, asked[i]])
                    target = " | ".join(test[i].answers)
                    yield Generate(prompt, target, self.max_new_tokens, stop="\n", tags=tags)

    def score(self, example: Example, output: Output) -> Scores:
        """Whether the line is one of the answers, but for case, punctuation and articles."""
        assert isinstance(example, Generate)
        assert isinstance(output, str)
        return {"correct": float(normal(output) in {normal(answer) for answer in example.target.split(" | ")})}

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        quoted: dict[str, dict[Any, str]] = {
            label: {length: f"{value:.3f}" for length, value in row.items()} for label, row in cls.published.items()
        }
        series = {}
        for run in runs:
            means = {
                length: np.mean([s["scores"]["correct"] for s in samples])
                for (length,), samples in group(run.samples.values(), ("context_length",)).items()
            }
            series[run.label] = [(length, float(mean)) for length, mean in sorted(means.items())]
        note = "95 % interval in brackets."
        return [
            by_column(
                "exact match, by tokens of context",
                runs,
                "correct",
                "context_length",
                head=tokens,
                quoted=quoted,
                note=note,
            ),
            Curves(f"{cls.name}, exact match", "context, tokens", "share right", series),
        ]


@dataclass(frozen=True)
class Trec(InContext):
    """TREC question classification, as Li and Roth published it: `train_5500.label` and `TREC_10.label`."""

    name: ClassVar[str] = "trec"
    summary: ClassVar[str] = "in-context question classification at 2K to 8K and beyond"
    form: ClassVar[str] = "Question: {}\nType:"
    published: ClassVar[dict[str, dict[int, float]]] = TREC

    fine: bool = option(False, "the 50 fine classes instead of the 6 coarse ones")

    def read(self, file: Path) -> list[Item]:
        if file.suffix == ".jsonl":
            return read_jsonl(file)
        items = []
        text = file.read_text(encoding="latin-1").removeprefix("\u00ef\u00bb\u00bf")  # a byte order mark
        for number, line in enumerate(_lines(text), start=1):
            match = re.fullmatch(r"([A-Z]+):(\w+) (.+)", line.strip())
            if not match or match[1] not in TREC_CLASSES:
                raise ValueError(f"line {number} of {file} is no 'CLASS:subclass question' of TREC: {line[:60]!r}.")
            coarse, fine, question = TREC_CLASSES[match[1]], match[2], match[3]
            items.append(Item(question, (f"{coarse}: {fine}" if self.fine else coarse,)))
        return _some(items, file)


TREC_CLASSES = {
    "ABBR": "Abbreviation",
    "DESC": "Description",
    "ENTY": "Entity",
    "HUM": "Human",
    "LOC": "Location",
    "NUM": "Number",
}


@dataclass(frozen=True)
class WebQs(InContext):
    """WebQuestions, in its own form (utterance, targetValue) or as lines of {"question", "answers"}."""

    name: ClassVar[str] = "webqs"
    summary: ClassVar[str] = "in-context question answering at 2K to 8K and beyond"
    form: ClassVar[str] = "Question: {}\nAnswer:"
    published: ClassVar[dict[str, dict[int, float]]] = WEBQS

    def read(self, file: Path) -> list[Item]:
        if file.suffix != ".json":
            return read_jsonl(file)
        try:
            entries = parse_json(read_utf8(file))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}.") from error
        if not isinstance(entries, list):
            raise ValueError(f'{file} must be a list of {{"utterance": ..., "targetValue": ...}}, is: {entries!r:.60}.')
        items = []
        for number, entry in enumerate(entries, start=1):
            where = f"entry {number} of {file}"
            try:
                question, target = entry["utterance"], entry["targetValue"]
                # (list (description "Padm\u00e9 Amidala") (description Naboo))
                found = re.findall(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()]*))\)', target)
            except (KeyError, TypeError) as error:
                raise ValueError(f'{where} is no {{"utterance": ..., "targetValue": ...}}: {error!r}.') from error
            answers = [quoted.replace('\\"', '"') or bare for quoted, bare in found if (quoted + bare).strip()]
            if answers:  # some of the published questions have none
                items.append(_item(question, answers, where))
        return _some(items, file)


def find_split(folder: str, split: str) -> Path:
    """The file of a split: its name says "train" or "test" (TREC's own test file is TREC_10)."""
    root = Path(folder)
    files = sorted(file for file in root.glob("*") if file.suffix in SUFFIXES) if root.is_dir() else []
    named = [file for file in files if split in file.name.lower() or (split == "test" and file.stem == "TREC_10")]
    if named:
        if len(named) > 1:
            others = ", ".join(file.name for file in named[1:])
            logger.warning("the %s split is %s; left out, as one file is read: %s", split, named[0], others)
        return named[0]
    there = ", ".join(file.name for file in files) or "none"
    raise ValueError(
        f"{folder!r} has no {split} split: a file with {split!r} in its name ({', '.join(SUFFIXES)}); found: {there}."
    )


def read_jsonl(file: Path) -> list[Item]:
    """Lines of {"question": ..., "answers": [...]} (or "answer"), or of question, tab, list of answers."""
    items = []
    for number, line in enumerate(_lines(read_utf8(file)), start=1):
        where = f"line {number} of {file}"
        try:
            if line.startswith("{"):
                record = parse_json(line)
                question, answers = record["question"], record["answers"] if "answers" in record else record["answer"]
            else:
                question, _, listed = line.partition("\t")
                answers = ast.literal_eval(listed)
        except (ValueError, KeyError, SyntaxError) as error:
            raise ValueError(f'{where} is no {{"question": ..., "answers": [...]}}: {error!r}.') from error
        items.append(_item(question, [answers] if isinstance(answers, str) else answers, where))
    return _some(items, file)


def _item(question: Any, answers: Any, where: str) -> Item:
    if not isinstance(question, str):
        raise ValueError(f"{where}: the question must be a text, got {question!r}.")
    texts = isinstance(answers, list | tuple) and all(isinstance(answer, str) and answer.strip() for answer in answers)
    if not answers or not texts:
        raise ValueError(f"{where}: the answers must be texts, at least one and none empty, got {answers!r}.")
    return Item(question, tuple(answers))


def _lines(text: str) -> list[str]:
    """Lines ended by line feeds only: a question may hold other separators of lines."""
    return text.rstrip("\n").split("\n")


def _some(items: list[Item], file: Path) -> list[Item]:
    if not items:
        raise ValueError(f"{file} holds no question.")
    return items


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and spare spaces."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))
