"""Passkey retrieval: a number stands once in a long, dull text, and is asked for at its end.

The prompt is that of Landmark attention (arXiv 2305.16300), as LongLLaMA uses it (arXiv 2307.03170). It says how far
back a model can look for one thing, and nothing about what else it understands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oncelm.eval.examples import Example, Generate, Output, Scores
from oncelm.eval.fields import LENGTH, NUMBER, SHARE, Kinds
from oncelm.eval.papers import PASSKEY
from oncelm.eval.results import Run
from oncelm.eval.statistics import estimate
from oncelm.eval.task import COUNTED, Task, option
from oncelm.eval.views import Curves, View, by_column, group, heatmap, tokens

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
LARGEST_KEY = 50_000


@dataclass(frozen=True)
class Passkey(Task):
    """The pass key stands at a random place of the filler in every trial, or at each of some depths."""

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "find a number in a long text of five sentences over and over"
    tag_kinds: ClassVar[Kinds] = {"context_length": LENGTH, "depth": NUMBER}
    score_kinds: ClassVar[Kinds] = {"correct": SHARE}

    lengths: tuple[int, ...] = option((4096, 16384, 32768), "tokens of prompt and answer together")
    depths: int = option(
        0, "depths of the key, evenly from 0 to 100 %%; 0: a random one in every trial", least=0, most=COUNTED
    )
    trials: int = option(20, "samples of each length, and of each depth", most=COUNTED)
    max_new_tokens: int = option(10, "tokens of the answer")

    def count(self) -> int:
        return len(self.lengths) * max(1, self.depths) * self.trials

    def examples(self, codec: Codec, seed: int) -> Iterator[Example]:
        codec.check(KEY.format(key=1234567890), "the pass key")
        start, filler, question = np.concatenate([codec.prefix, codec.encode(TASK)]), codec.encode(FILLER), QUESTION
        for length in self.lengths:
            for trial, place in enumerate(self._places(seed, length)):
                key = str(np.random.default_rng([seed, length, trial]).integers(1, LARGEST_KEY + 1))
                hidden, asked = codec.encode(KEY.format(key=key)), codec.encode(question)
                room = length - self.max_new_tokens - len(start) - len(hidden) - len(asked)
                if room < len(filler):
                    least = length - room + len(filler)
                    raise ValueError(f"a context of {length} tokens is too short: a passkey prompt takes {least}.")
                text = np.resize(filler, room)
                at = round(room * place) // len(filler) * len(filler)  # between two sentences
                prompt = np.concatenate([start, text[:at], hidden, text[at:], asked])
                tags = {"context_length": length, "depth": round(100 * place, 1), "trial": trial}
                yield Generate(prompt, key, self.max_new_tokens, tags=tags)

    def _places(self, seed: int, length: int) -> list[float]:
        """Where the keys stand, as shares of the filler; ever deeper, so that what texts share is read once."""
        if self.depths:
            evenly = np.linspace(0, 1, self.depths) if self.depths > 1 else np.array([0.5])
            return np.repeat(evenly, self.trials).tolist()
        return np.sort(np.random.default_rng([seed, length]).random(self.trials)).tolist()

    def decided(self, example: Example, text: str) -> bool:
        """Something else than a digit is there, behind a number or instead of one."""
        return re.match(r"\s*\d*[^\d\s]|\s*\d+\s", text) is not None

    def score(self, example: Example, output: Output) -> Scores:
        """Whether the answer starts with the pass key, and not with a number that only begins like it."""
        assert isinstance(example, Generate)
        assert isinstance(output, str)
        found = re.match(r"\s*(\d+)", output)
        return {"correct": float(found is not None and found[1] == example.target)}

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        quoted = {label: {length: f"{v:.3f}" for length, v in row.items()} for label, row in PASSKEY.items()}
        title, note = "share right, by length", "95 % interval in brackets."
        table = by_column(title, runs, "correct", "context_length", head=tokens, quoted=quoted, note=note)
        series = {}
        for run in runs:
            found = group(run.samples.values(), ("context_length",))
            series[run.label] = [
                (length, estimate([s["scores"]["correct"] for s in samples]).mean)
                for (length,), samples in sorted(found.items())
            ]
        maps = [
            heatmap(run, "correct", "context_length", "depth", run.label, "tokens", "depth, %")
            for run in runs
            if run.configuration["options"].get("depths")  # random ones are all different
        ]
        return [table, Curves(title, "tokens", "share right", series), *maps]
