"""Perplexity of answers about long documents, at several lengths of context (YOCO, long documents)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oncelm.eval.examples import Example, Output, Score, Scores, Tags, TokenScores
from oncelm.eval.fields import LENGTH, NUMBER, TEXT, Kinds
from oncelm.eval.results import Run
from oncelm.eval.statistics import Estimate, estimate
from oncelm.eval.task import Task, option
from oncelm.eval.tasks.questions import Question, read_questions
from oncelm.eval.views import Curves, Table, View, exponential, group, perplexity, tokens

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec


@dataclass(frozen=True)
class LongPpl(Task):
    """The same answers at every length; what grows is how much of the document the model has read, from its start."""

    name: ClassVar[str] = "longppl"
    summary: ClassVar[str] = "answer perplexity on GovReport, QMSum, Qasper, NarrativeQA at 4K to 16K"
    tag_kinds: ClassVar[Kinds] = {"dataset": TEXT, "context_length": LENGTH}
    score_kinds: ClassVar[Kinds] = {"loss": NUMBER, "tokens": LENGTH}

    data: str = option("", "folder with gov_report.jsonl, qmsum.jsonl, qasper.json, narrativeqa.jsonl: any of them")
    lengths: tuple[int, ...] = option((4096, 8192, 12288, 16384), "tokens of document, question and answer at most")
    questions: int = option(100, "questions of each data set")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("longppl needs a folder of questions: --data DIR.")

    def examples(self, codec: Codec, seed: int) -> Iterator[Example]:
        for _, of_dataset in groupby(read_questions(self.data), key=lambda question: question.dataset):
            chosen = list(of_dataset)[: self.questions]
            for text, asked in groupby(chosen, key=lambda question: question.document):
                document = np.concatenate([codec.prefix, *codec.stream([text])])
                questions = list(asked)
                longest = min(self.lengths) // 2  # of an answer: the same tokens are scored at every length
                for length in sorted(self.lengths):
                    yield from (self._example(codec, document, question, length, longest) for question in questions)

    @staticmethod
    def _example(codec: Codec, document: np.ndarray, question: Question, length: int, longest_answer: int) -> Score:
        asks = f"\n\nQuestion: {question.question}\nAnswer:" if question.question else "\n\nSummary:"
        asked, answer = codec.pair(asks, " " + question.answer.strip())
        answer = answer[:longest_answer]
        room = length - len(asked) - len(answer)
        if room < 1:
            raise ValueError(f"a context of {length} tokens has no room for a document beside question and answer.")
        tags: Tags = {"dataset": question.dataset, "context_length": length}
        return Score(np.concatenate([document[:room], asked]), answer, question.answer, tags)

    def score(self, example: Example, output: Output) -> Scores:
        """Mean nats of the answer's tokens, and how many there are."""
        assert isinstance(output, TokenScores)
        return {"loss": float(-output.log_likelihoods.mean(dtype=np.float64)), "tokens": len(output.log_likelihoods)}

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        lengths = sorted({s["tags"]["context_length"] for run in runs for s in run.samples.values()})
        rows, series = [], {}
        for run in runs:
            for (dataset,), samples in group(run.samples.values(), ("dataset",)).items():
                cells = {length: _loss(there) for (length,), there in group(samples, ("context_length",)).items()}
                rows.append(
                    [run.label, dataset, *(perplexity(cells[length]) if length in cells else "" for length in lengths)]
                )
                series[f"{run.label}, {dataset}"] = [
                    (length, exponential(e.mean)) for length, e in sorted(cells.items())
                ]
        header = ["model", "data", *map(tokens, lengths)]
        note = "Of the answer's tokens; in brackets the 95 % interval, of questions."
        return [
            Table("answer perplexity, by tokens of context", header, rows, note=note),
            Curves("answer perplexity", "context, tokens", "perplexity", series),
        ]


def _loss(samples: Sequence[dict]) -> Estimate:
    return estimate([s["scores"]["loss"] for s in samples], [s["scores"]["tokens"] for s in samples])
