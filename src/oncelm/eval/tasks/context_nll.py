"""Loss by how much of a document is in view: does a longer context, or memory, help? (LongLLaMA, section 5)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oncelm.eval.documents import read_documents
from oncelm.eval.examples import Example, Output, Score, Scores, TokenScores
from oncelm.eval.fields import NUMBER, WHOLE, Kinds
from oncelm.eval.results import Run
from oncelm.eval.statistics import estimate
from oncelm.eval.task import Task, option
from oncelm.eval.tasks.nll import first_ids
from oncelm.eval.views import Curves, View, by_column, exponential, group, perplexity, tokens

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec


@dataclass(frozen=True)
class ContextNll(Task):
    """The same tokens of each document at every context; what grows is how many tokens before them are in view. For a
    LongLLaMA, whose window is short, that is what it has in memory.
    """

    name: ClassVar[str] = "context-nll"
    summary: ClassVar[str] = "loss of the same tokens with ever more of the document before them"
    tag_kinds: ClassVar[Kinds] = {"context": WHOLE}
    score_kinds: ClassVar[Kinds] = {"loss": NUMBER}

    documents: str = option("moby_dick", "text file or folder, or moby_dick or sotu, which are bundled")
    contexts: tuple[int, ...] = option((8192, 32768, 131072), "tokens before the scored ones; none at all is added")
    scored: int = option(1024, "tokens that are scored, behind the longest context of each document")

    def longest(self) -> int:
        return max(self.contexts) + self.scored

    def examples(self, codec: Codec, seed: int) -> Iterator[Example]:
        start, found = max(self.contexts), 0
        for document in read_documents(self.documents):
            ids = first_ids(codec, document.text, self.longest())
            if len(ids) < self.longest():
                continue
            found += 1
            for context in sorted({0, *self.contexts}):
                seen = ids[start - max(1, context) : start]  # nothing is predicted without a token before it
                yield Score(seen, ids[start:], tags={"document": document.name, "context": context})
        if not found:
            raise ValueError(
                f"no document of {self.documents!r} has {self.longest():,} tokens (the longest context, and scored)."
            )

    def score(self, example: Example, output: Output) -> Scores:
        """Mean nats of the scored tokens."""
        assert isinstance(output, TokenScores)
        return {"loss": float(-output.log_likelihoods.mean(dtype=np.float64))}

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        note = "Of the same tokens everywhere; interval: 95 %, of documents."
        table = by_column(
            "perplexity by tokens in view",
            runs,
            "loss",
            "context",
            show=perplexity,
            head=tokens,
            note=note,
        )
        series = {}
        for run in runs:
            by_context = group(run.samples.values(), ("context",))
            means = {
                context: estimate([s["scores"]["loss"] for s in found]) for (context,), found in by_context.items()
            }
            series[run.label] = [(max(1, context), exponential(e.mean)) for context, e in sorted(means.items())]
        return [table, Curves("perplexity by tokens in view", "tokens in view", "perplexity", series)]
