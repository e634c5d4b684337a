"""Associative recall: loss on tokens that the context gives away, and on those that it cannot (YOCO, ablations)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oncelm.eval.documents import Haystack
from oncelm.eval.examples import Example, Output, Score, Scores, TokenScores
from oncelm.eval.fields import LENGTH, NUMBER, WHOLE, Kinds, optional
from oncelm.eval.papers import ABLATIONS_160M
from oncelm.eval.results import Run
from oncelm.eval.statistics import Estimate, estimate
from oncelm.eval.task import Task, option
from oncelm.eval.views import Sample, Table, View, plain

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec


def completes_seen_bigram(ids: np.ndarray) -> np.ndarray:
    """Whether each token from the second on, with the one before it, occurred earlier in `ids` [T]: bool [T - 1]."""
    pairs = ids[:-1].astype(np.int64) << 32 | ids[1:].astype(np.int64)
    _, first = np.unique(pairs, return_index=True)
    seen = np.ones(len(pairs), dtype=bool)
    seen[first] = False
    return seen


@dataclass(frozen=True)
class ArHit(Task):
    """Blocks of text; every token after a block's first is a hit or a first occurrence."""

    name: ClassVar[str] = "ar-hit"
    summary: ClassVar[str] = "loss on tokens that complete a bigram seen in the context, and on the others"
    score_kinds: ClassVar[Kinds] = {
        "loss": NUMBER, "tokens": LENGTH, "hits": WHOLE, "hit_loss": optional(NUMBER), "first_loss": optional(NUMBER),
    }  # fmt: skip

    documents: str = option("moby_dick", "text file or folder, or moby_dick or sotu, which are bundled")
    length: int = option(2048, "tokens of a block", least=3)
    blocks: int = option(50, "blocks, one after the other from the start of the text")

    def longest(self) -> int | None:
        return self.length

    def count(self) -> int:
        return self.blocks

    def examples(self, codec: Codec, seed: int) -> Iterator[Example]:
        text, size = Haystack(self.documents, codec), self.length - len(codec.prefix)
        for block in range(self.blocks):
            if text.ends_before((block + 1) * size):
                raise ValueError(
                    f"{self.documents!r} has text for {block} blocks of {self.length} tokens, not for {self.blocks}; "
                    "ask for fewer (blocks) or shorter ones (length)."
                )
            ids = np.concatenate([codec.prefix, text.take(block * size, size)])
            yield Score(ids[:1], ids[1:], tags={"block": block})

    def score(self, example: Example, output: Output) -> Scores:
        """Mean nats of all tokens, of hits and of first occurrences, with their numbers."""
        assert isinstance(output, TokenScores)
        assert isinstance(example, Score)
        losses = -output.log_likelihoods.astype(np.float64)
        hit = completes_seen_bigram(np.concatenate([example.prompt, example.continuation]))
        scores: Scores = {"loss": float(losses.mean()), "tokens": len(losses), "hits": int(hit.sum())}
        for name, chosen in (("hit_loss", hit), ("first_loss", ~hit)):
            if chosen.any():  # a block without any has no mean
                scores[name] = float(losses[chosen].mean())
        return scores

    @classmethod
    def check(cls, sample: Sample) -> None:
        super().check(sample)
        scores = sample["scores"]
        for name, count in (("hit_loss", scores["hits"]), ("first_loss", scores["tokens"] - scores["hits"])):
            if name in scores and count < 1:
                raise ValueError(f"the scores have a {name} of {count} tokens: tokens and hits do not fit.")

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        rows = [[run.label, *(plain(e) if e else "" for e in _estimates(run)), _share(run)] for run in runs]
        header = ["model", "all", "AR-hit", "first occurrence", "share of hits"]
        quoted = [[name, *(f"{value:.3f}" for value in values), ""] for name, values in ABLATIONS_160M.items()]
        note = (
            "Nats a token; in brackets the 95 % interval, of blocks. The published rows are of 160M models with "
            "another tokenizer on other text: compare differences between rows, not levels."
        )
        return [Table("loss of hits and of first occurrences", header, rows, quoted, note)]


def _estimates(run: Run) -> list[Estimate | None]:
    found: list[Estimate | None] = []
    scores = [sample["scores"] for sample in run.samples.values()]
    for name, weight in (
        ("loss", lambda s: s["tokens"]),
        ("hit_loss", lambda s: s["hits"]),
        ("first_loss", lambda s: s["tokens"] - s["hits"]),
    ):
        there = [s for s in scores if name in s]
        found.append(estimate([s[name] for s in there], [weight(s) for s in there]) if there else None)
    return found


def _share(run: Run) -> str:
    scores = [sample["scores"] for sample in run.samples.values()]
    return f"{sum(s['hits'] for s in scores) / max(1, sum(s['tokens'] for s in scores)):.2f}"
