"""RULER: thirteen synthetic tasks at any length, with lm-eval's prompts and RULER's judgement (arXiv 2404.06654).

A context length counts the prompt and the answer. Each prompt is tokenized as one text and has the most haystack that
still fits; where not even the least fits, another one is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from oncelm.eval.examples import Example, Generate, Output, Scores, Tags
from oncelm.eval.fields import LENGTH, SHARE, Kind, Kinds
from oncelm.eval.results import Run
from oncelm.eval.statistics import estimate
from oncelm.eval.task import Task, option
from oncelm.eval.tasks.ruler_prompts import KINDS, NEEDLE, Draft, Texts
from oncelm.eval.views import Sample, Table, View, group, percent, tokens
from oncelm.utils.errors import unknown

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec

DRAWS = 64  # of a sample, until one fits the context
BISECT_AFTER = 6  # guesses


@dataclass(frozen=True)
class Ruler(Task):
    """Needles of many kinds, variable tracking, common and frequent words, questions about documents.

    Six tasks need nothing. The others need --data: essays.txt, squad.json (SQuAD 2.0's dev set) and hotpotqa.json
    (HotpotQA's dev set, distractor setting). Without it, the six are run.
    """

    name: ClassVar[str] = "ruler"
    summary: ClassVar[str] = "RULER: needles, variables, frequent words, questions; 13 tasks a length"
    tag_kinds: ClassVar[Kinds] = {
        "task": Kind("one of RULER's tasks", lambda value: isinstance(value, str) and value in KINDS),
        "context_length": LENGTH,
    }
    score_kinds: ClassVar[Kinds] = {"correct": SHARE}

    lengths: tuple[int, ...] = option((4096, 8192, 16384, 32768), "tokens of prompt and answer together")
    samples: int = option(100, "samples of each task at each length")
    only: str = option("", "some of the tasks, separated by commas")
    data: str = option("", "folder with essays.txt, squad.json, hotpotqa.json, as far as the tasks need them")

    def __post_init__(self) -> None:
        super().__post_init__()
        folder = Path(self.data)
        for file, name in ((KINDS[name].file, name) for name in self.tasks() if KINDS[name].file):
            if not self.data:
                raise ValueError(f"{name} needs --data DIR, a folder with {file}; recipes/eval_data.py builds one.")
            if not folder.is_dir():
                raise ValueError(f"no folder of texts at {self.data}; recipes/eval_data.py ruler builds one.")
            if not (folder / file).is_file():
                there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
                raise ValueError(f"{self.data} lacks {file}, which {name} needs; it has: {there}. --only asks others.")

    def tasks(self) -> list[str]:
        """The names of the tasks to ask."""
        chosen = list(dict.fromkeys(name.strip() for name in self.only.split(",") if name.strip()))
        for name in chosen:
            if name not in KINDS:
                raise unknown("task of ruler", name, KINDS)
        return chosen or [name for name, kind in KINDS.items() if self.data or not kind.file]

    def count(self) -> int:
        return len(self.lengths) * len(self.tasks()) * self.samples

    def examples(self, codec: Codec, seed: int) -> Iterator[Example]:
        codec.check(NEEDLE.format(kind="numbers", key="word", value="1234567890"), "a needle")
        texts = Texts(self.data)
        for length in self.lengths:
            for name in self.tasks():
                guess = 0  # the units of the first sample, so that each depends on the seed and its number only
                for sample in range(self.samples):
                    prompt, answers, units = self._fill(codec, texts, seed, name, length, sample, guess)
                    guess = guess or units
                    tags: Tags = {"task": name, "context_length": length, "sample": sample}
                    yield Generate(prompt, " | ".join(answers), KINDS[name].max_new_tokens, tags=tags)

    def _fill(
        self, codec: Codec, texts: Texts, seed: int, name: str, length: int, sample: int, guess: int
    ) -> tuple[np.ndarray, list[str], int]:
        """The ids of a sample's prompt, its answers, and the units of haystack that it has room for."""
        kind, number = KINDS[name], list(KINDS).index(name)
        room = length - kind.max_new_tokens - len(codec.prefix)
        random = np.random.default_rng([seed, length, number, sample])
        shortest = 1 << 60
        for _ in range(DRAWS):
            draft = kind.draft(texts, random, length)
            ids, units = most_that_fits(draft, codec.encode, room, guess)
            if units >= draft.least:
                return np.concatenate([codec.prefix, ids]), draft.answers, units
            shortest = min(shortest, len(ids))
        raise ValueError(
            f"a context of {length} tokens is too short for {name}: its shortest prompt and an answer take "
            f"{length - room + shortest} tokens."
        )

    def decided(self, example: Example, text: str) -> bool:
        """All answers are there."""
        return self.score(example, text)["all"] == 1

    def score(self, example: Example, output: Output) -> Scores:
        """Which of the answers are somewhere in the output, in any case.

        `all`: the share of them; `any`: whether one is. The task's own of the two is `correct`.
        """
        assert isinstance(example, Generate)
        assert isinstance(output, str)
        text = re.sub(r"[\x00-\x1f]", "\n", output).lower()
        found = [answer.lower() in text for answer in example.target.split(" | ")]
        scores = {"all": sum(found) / len(found), "any": float(any(found))}
        own = "any" if KINDS[str(example.tags["task"])].any_answer else "all"
        return {"correct": scores[own], **scores}

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        return [_table(run) for run in runs]


def most_that_fits(
    draft: Draft, encode: Callable[[str], np.ndarray], room: int, guess: int = 0
) -> tuple[np.ndarray, int]:
    """The ids of the draft with the most units that fit into `room` tokens, and how many units those are.

    Where not even the least number fits, it is the ids of the least and one unit fewer. Tokens grow about evenly with
    units, so a few guesses are enough; `guess` is the first.
    """
    best = short = encode(draft.text(draft.least))
    if len(short) > room:
        return short, draft.least - 1
    fits, fails = draft.least, draft.most + 1  # the most units known to fit, the fewest known not to
    units = guess if guess > fits else 2 * fits + 16
    for attempt in range(200):
        units = min(max(units, fits + 1), fails - 1)
        if units == fits:
            break
        ids = encode(draft.text(units))
        slope = max((len(ids) - len(short)) / (units - draft.least), 1e-3)  # tokens a unit
        if len(ids) <= room:
            best, fits = ids, units
        else:
            fails = units
        if attempt < BISECT_AFTER or fails > draft.most:
            units += round((room - len(ids)) / slope) or (1 if len(ids) <= room else -1)
        else:
            units = (fits + fails) // 2
    return best, fits


def _table(run: Run) -> Table:
    """A row a task, a column a length, and the average of the tasks."""
    cells = group(run.samples.values(), ("task", "context_length"))
    names = [name for name in KINDS if any(task == name for task, _ in cells)]
    lengths = sorted({length for _, length in cells})
    rows = [[name, *(_share(cells.get((name, length), [])) for length in lengths)] for name in names]
    averages = []
    for length in lengths:
        means = [
            np.mean([s["scores"]["correct"] for s in cells[name, length]]) for name in names if (name, length) in cells
        ]
        averages.append(f"{np.mean(means):.2f}" if len(means) == len(names) else "")
    rows.append([f"average of {len(names)}", *averages])
    note = "Mean (95 % interval). lm-eval's figure for ruler_qa_* is the score `all`, RULER's the score `any`."
    return Table(f"{run.label}, by length in tokens", ["task", *map(tokens, lengths)], rows, note=note)


def _share(samples: Sequence[Sample]) -> str:
    return percent(estimate([sample["scores"]["correct"] for sample in samples])) if samples else ""
