"""Needles in a haystack: a sentence with a number, hidden in a long text, and asked for at its end.

The protocol is that of YOCO's released code; `strict` mends its flaws: cities are unique, the first number of the
answer must be the right one and whole, and no text of the haystack comes twice while there is other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oncelm.eval.documents import Haystack
from oncelm.eval.examples import Example, Generate, Output, Scores
from oncelm.eval.fields import LENGTH, NUMBER, SHARE, Kinds
from oncelm.eval.papers import MULTI_NEEDLE_128K
from oncelm.eval.results import Run
from oncelm.eval.task import COUNTED, Task, option
from oncelm.eval.tasks.cities import CITIES
from oncelm.eval.views import Table, View, by_column, heatmap, tokens

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec

NEEDLE = "The special magic {city} number is {number} . "
QUESTION = "\nWhat is the special magic {city} number? The special magic {city} number is "
LARGEST_NUMBER = 50_000


@dataclass(frozen=True)
class Needle(Task):
    """One needle, 11 depths, 10 runs a length."""

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "find one sentence in a long text: 11 depths x 10 runs a length"

    lengths: tuple[int, ...] = option((4096, 8192, 16384, 32768), "tokens of prompt and answer together")
    depths: int = option(11, "depths of the needle, evenly from 0 to 100 %%", most=COUNTED)
    runs: int = option(10, "runs at each length and depth", most=COUNTED)
    haystack: str = option("sotu", "text file or folder, or sotu: the bundled State of the Union addresses")
    strict: bool = option(False, "unique cities, the whole number as the first one written, no haystack text twice")
    max_new_tokens: int = option(20, "tokens of the answer")
    needles: ClassVar[tuple[int, ...]] = (1,)
    tag_kinds: ClassVar[Kinds] = {"context_length": LENGTH, "depth": NUMBER, "needles": LENGTH}
    score_kinds: ClassVar[Kinds] = {"correct": SHARE}

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in self.needles:
            if not 1 <= count <= len(CITIES):
                raise ValueError(f"needles must be between 1 and {len(CITIES)} (cities known), got {count}.")

    def count(self) -> int:
        return len(self.lengths) * len(self.needles) * self.runs * self.depths

    def examples(self, codec: Codec, seed: int) -> Iterator[Example]:
        for city in CITIES:
            codec.check(NEEDLE.format(city=city, number=1234567890), "the needle")
        haystack = Haystack(self.haystack, codec)
        used = 0  # tokens of the haystack that earlier runs have shown
        for length in self.lengths:
            for count in self.needles:
                starts = [used + run * length if self.strict else 0 for run in range(self.runs)]
                used += self.runs * length
                runs = [self._run(codec, haystack, start, seed, length, count, run) for run, start in enumerate(starts)]
                if self.strict or count > 1:
                    yield from chain.from_iterable(runs)
                else:  # all runs have one text: depth by depth, it is read once for all of them
                    yield from chain.from_iterable(zip(*runs, strict=True))

    def _run(
        self, codec: Codec, haystack: Haystack, start: int, seed: int, length: int, count: int, run: int
    ) -> Iterator[Example]:
        """One run: the same text and the same other needles, with the one that is asked for ever deeper in it."""
        random = np.random.default_rng([seed, length, count, run])
        others = [str(number) for number in random.integers(1, LARGEST_NUMBER + 1, count - 1)]
        places = random.random(count - 1)
        # with repeats, as likely as in the released code's list of cities: ambiguous in 0.7 % of pairs
        drawn = random.choice(len(CITIES), (self.depths, count), replace=True)
        order = random.permutation(len(CITIES))
        numbers = random.integers(1, LARGEST_NUMBER + 1, self.depths)
        for step, depth in enumerate(np.linspace(0, 100, self.depths).tolist() if self.depths > 1 else [50.0]):
            if self.strict:
                city, *rest = (
                    CITIES[i] for i in (order[count - 1 + step % (len(CITIES) - count + 1)], *order[: count - 1])
                )
            else:
                city, *rest = (CITIES[i] for i in (drawn[step, 0], *drawn[0, 1:]))
            number = str(numbers[step])
            hidden = [(place * 100, c, n) for place, c, n in zip(places, rest, others, strict=True)]
            prompt = self._prompt(codec, haystack, start, length, [(depth, city, number), *hidden], city)
            tags = {"context_length": length, "depth": round(depth, 1), "needles": count, "run": run}
            yield Generate(prompt, number, self.max_new_tokens, tags=tags)

    def _prompt(
        self,
        codec: Codec,
        haystack: Haystack,
        start: int,
        length: int,
        hidden: Sequence[tuple[float, str, str]],
        asked: str,
    ) -> np.ndarray:
        """The haystack with `hidden` (depth, city, number) in it and the question behind, one token row.

        `hidden` starts with the needle that is asked for. The places of the others do not depend on it, so that the
        prompts of a run begin alike as far as they can.
        """
        question = codec.encode(QUESTION.format(city=asked))
        needles = [(depth, codec.encode(NEEDLE.format(city=city, number=number))) for depth, city, number in hidden]
        room = length - self.max_new_tokens - len(codec.prefix) - len(question) - sum(len(ids) for _, ids in needles)
        if room < 1:
            raise ValueError(
                f"a context of {length} tokens has no room for a haystack: needles, question and answer take "
                f"{length - room} tokens."
            )
        text = haystack.take(start, room)
        spans = [room, *[length] * (len(needles) - 1)]
        placed = [
            (haystack.sentence_end(text, min(room, round(span * depth / 100))), ids)
            for span, (depth, ids) in zip(spans, needles, strict=True)
        ]
        parts, at = [codec.prefix], 0
        for place, ids in sorted(placed, key=lambda item: item[0]):
            parts += [text[at:place], ids]
            at = place
        return np.concatenate([*parts, text[at:], question])

    def decided(self, example: Example, text: str) -> bool:
        """The number has been found, and the first number written is whole."""
        return str(example.target) in text and re.search(r"\d+\D", text) is not None

    def score(self, example: Example, output: Output) -> Scores:
        """`contains`: the number is somewhere in the answer, as in the paper; `exact`: it is the first one, whole."""
        assert isinstance(example, Generate)
        assert isinstance(output, str)
        first = re.search(r"\d+", output)
        contains, exact = example.target in output, first is not None and first[0] == example.target
        return {
            "correct": float(exact if self.strict else contains),
            "contains": float(contains),
            "exact": float(exact),
        }

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        found: list[View] = [_summary("share found, by length", runs, {})]
        for run in runs:
            mode = "strict" if run.configuration["options"].get("strict") else "paper's protocol"
            title = f"{run.label}, {mode}"
            found.append(heatmap(run, "correct", "context_length", "depth", title, "tokens", "depth, %"))
        return found


@dataclass(frozen=True)
class MultiNeedle(Needle):
    """Several needles at random places, one of them asked for."""

    name: ClassVar[str] = "multi-needle"
    summary: ClassVar[str] = "N needles in a long text, one asked for: 10 depths x 5 runs"

    lengths: tuple[int, ...] = option((32768,), "tokens of prompt and answer together")
    depths: int = option(10, "depths of the needle that is asked for, evenly from 0 to 100 %%", most=COUNTED)
    runs: int = option(5, "runs at each length, depth and number of needles", most=COUNTED)
    needles: tuple[int, ...] = option((1, 2, 4, 8), "numbers of needles")  # type: ignore[misc]

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        found: list[View] = []
        for length in sorted({s["tags"]["context_length"] for run in runs for s in run.samples.values()}):
            there = [_only(run, length) for run in runs]
            quoted = MULTI_NEEDLE_128K if length == 128 << 10 else {}
            found.append(
                _summary(f"share found at {tokens(length)} tokens, by number of needles", there, quoted, "needles")
            )
        for run in runs:
            found.append(heatmap(run, "correct", "needles", "depth", run.label, "needles", "depth, %"))
        return found


def _summary(title: str, runs: Sequence[Run], quoted: dict, column: str = "context_length") -> Table:
    shown = {label: {key: f"{value:.2f}" for key, value in row.items()} for label, row in quoted.items()}
    head = tokens if column == "context_length" else str
    note = "95 % interval in brackets."
    return by_column(title, runs, "correct", column, head=head, quoted=shown, note=note)


def _only(run: Run, length: int) -> Run:
    chosen = {i: s for i, s in run.samples.items() if s["tags"]["context_length"] == length}
    return replace(run, samples=chosen)
