"""Loss by position: does a model make use of what stands far back in a document? (YOCO, long documents)"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oncelm.eval.documents import read_documents
from oncelm.eval.examples import Example, Output, Score, Scores, TokenScores
from oncelm.eval.fields import LENGTH, LENGTHS, NUMBER, NUMBERS, Kinds
from oncelm.eval.results import Run
from oncelm.eval.statistics import estimate
from oncelm.eval.task import Task, option
from oncelm.eval.views import Curves, Sample, Table, View, plain, show_perplexity, tokens

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec

STEPS_AN_OCTAVE = 2


def bucket_edges(count: int) -> list[int]:
    """Positions 1 to count in buckets that grow evenly on a logarithmic scale: [1, 2, 3, 4, 6, 8, 11, ..., count + 1].

    Bucket i holds the positions edges[i] <= p < edges[i + 1]; position p is that of the token with p tokens before it.
    """
    steps = math.ceil(STEPS_AN_OCTAVE * math.log2(count + 1))
    edges = sorted({min(round(2 ** (i / STEPS_AN_OCTAVE)), count + 1) for i in range(steps + 1)})
    return [*edges, *([count + 1] if edges[-1] <= count else [])]


@dataclass(frozen=True)
class Nll(Task):
    """A document is a sample; its tokens go to one cache, chunk by chunk, each scored in view of all before it."""

    name: ClassVar[str] = "nll"
    summary: ClassVar[str] = "loss by position in documents of any length"
    score_kinds: ClassVar[Kinds] = {"loss": NUMBER, "tokens": LENGTH, "sums": NUMBERS, "counts": LENGTHS}

    documents: str = option("moby_dick", "text file or folder, or moby_dick or sotu, which are bundled")
    max_tokens: int | None = option(None, "tokens of a document to read at most (all)")
    min_tokens: int = option(2, "leave out shorter documents, so that every position has the same ones")

    def longest(self) -> int | None:
        return self.max_tokens

    def examples(self, codec: Codec, seed: int) -> Iterator[Example]:
        found = 0
        for document in read_documents(self.documents):
            ids = first_ids(codec, document.text, self.max_tokens)
            if len(ids) < max(2, self.min_tokens):
                continue
            found += 1
            yield Score(ids[:1], ids[1:], tags={"document": document.name})
        if not found:
            raise ValueError(f"no document of {self.documents!r} has {max(2, self.min_tokens)} tokens.")

    def score(self, example: Example, output: Output) -> Scores:
        """Nats a token; sums of each bucket, and the number of tokens in it."""
        assert isinstance(output, TokenScores)
        losses = -output.log_likelihoods.astype(np.float64)
        edges = np.array(bucket_edges(len(losses)))
        sums = np.add.reduceat(losses, edges[:-1] - 1)
        return {
            "loss": float(losses.mean()),
            "tokens": len(losses),
            "sums": sums.tolist(),
            "counts": np.diff(edges).tolist(),
        }

    @classmethod
    def check(cls, sample: Sample) -> None:
        super().check(sample)
        sums, counts = (len(sample["scores"][name]) for name in ("sums", "counts"))
        if sums != counts:
            raise ValueError(f"the scores have {sums} sums, but {counts} counts: one a bucket is right.")

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        windowed, cumulative, rows = {}, {}, []
        for run in runs:
            samples = list(run.samples.values())
            windowed[run.label], cumulative[run.label] = curves(samples)
            losses, weights = ([s["scores"][name] for s in samples] for name in ("loss", "tokens"))
            loss = estimate(losses, weights)
            rows.append([run.label, str(len(samples)), tokens(sum(weights)), plain(loss), show_perplexity(loss.mean)])
        header = ["model", "documents", "tokens", "nats a token", "perplexity"]
        return [
            Table("loss", header, rows, note="Mean over tokens; interval: 95 %, of documents."),
            Curves("loss at a position (windowed)", "position, tokens", "nats", windowed),
            Curves("loss up to a position (cumulative)", "position, tokens", "nats", cumulative),
        ]


Points = list[tuple[float, float]]


def curves(samples: Sequence[dict]) -> tuple[Points, Points]:
    """(position, mean loss): in each bucket, at its middle; and of all tokens up to each bucket's end."""
    depth = max((len(sample["scores"]["sums"]) for sample in samples), default=0)
    sums, counts, last = np.zeros(depth), np.zeros(depth), np.zeros(depth)
    for sample in samples:
        here = sample["scores"]
        width = len(here["sums"])
        sums[:width] += here["sums"]
        counts[:width] += here["counts"]
        last[:width] = np.maximum(last[:width], np.cumsum(here["counts"]))
    first = np.concatenate([[0], last[:-1]]) + 1
    middle, means = np.sqrt(first * last), np.cumsum(sums) / np.cumsum(counts)
    windowed = list(zip(middle.tolist(), (sums / counts).tolist(), strict=True))
    return windowed, list(zip(last.tolist(), means.tolist(), strict=True))


def first_ids(codec: Codec, text: str, count: int | None) -> np.ndarray:
    """The first `count` ids of a document (None: all), with what the tokenizer puts before every text."""
    parts, have = [codec.prefix], len(codec.prefix)
    for piece in codec.stream([text]):
        parts.append(piece)
        have += len(piece)
        if count is not None and have >= count:
            break
    return np.concatenate(parts)[:count]
