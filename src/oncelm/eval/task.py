"""What a task is: from a seed to examples, from an output to scores. docs/evaluation.md shows how to add one."""

from __future__ import annotations

import dataclasses
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from oncelm.eval.examples import Example, Output, Scores
from oncelm.eval.fields import OBJECT, Kinds, check_fields
from oncelm.eval.results import Run
from oncelm.eval.statistics import estimate
from oncelm.eval.views import Sample, Table, View, group, plain
from oncelm.utils.constraints import Constraint, Each, Flag, Number, Text, Whole
from oncelm.utils.errors import unknown

if TYPE_CHECKING:
    from oncelm.eval.model import Codec, LanguageModel

MOST = 2**31  # tokens of a text
COUNTED = 2**20  # of what is listed before the first question: depths, runs


class Task(ABC):
    """A frozen dataclass whose fields, made by `option`, are its options on the command line and in `options()`.

    Attributes:
        name: on the command line.
        summary: one line of help.
        by: tags that the default table groups by.
        tag_kinds, score_kinds: what the report needs of every sample; files are checked for it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    by: ClassVar[tuple[str, ...]] = ()
    tag_kinds: ClassVar[Kinds] = {}
    score_kinds: ClassVar[Kinds] = {}

    def __post_init__(self) -> None:
        """ValueError for an option whose value makes no sense; a task with checks of its own calls this first."""
        for name, constraint in self.constraints().items():
            object.__setattr__(self, name, constraint(name, getattr(self, name)))

    @abstractmethod
    def examples(self, codec: Codec, seed: int) -> Iterable[Example]:
        """The examples, always the same for a seed. Those whose prompts begin alike should follow each other."""

    @abstractmethod
    def score(self, example: Example, output: Output) -> Scores:
        """Judge the output (text of a Generate, TokenScores of a Score): figures by name."""

    def decided(self, example: Example, text: str) -> bool:
        """Whether nothing written after `text` could change the scores: a Generate's answer ends there."""
        return False

    def answers(
        self, model: LanguageModel, seed: int, done: Mapping[int, Sample], limit: int | None, max_tokens: int | None
    ) -> tuple[int, Iterator[list[Sample]]] | None:
        """Of a task that asks in batches of its own: how many samples it has, and the lines of those not `done`.

        Those that come together are on disk before more are asked for. None: `examples` are asked one by one. Texts
        longer than `max_tokens` are refused.
        """
        return None

    def count(self) -> int | None:
        """How many examples there are, if that is known before they are made."""
        return None

    def longest(self) -> int | None:
        """Tokens of the longest text that a model will hold, if that is known before."""
        return max(getattr(self, "lengths", ()), default=None)

    @classmethod
    def check(cls, sample: Sample) -> None:
        """ValueError unless `views` can show this sample of a file."""
        check_fields("tags", sample["tags"], cls.tag_kinds)
        check_fields("scores", sample["scores"], cls.score_kinds)

    @classmethod
    def views(cls, runs: Sequence[Run]) -> list[View]:
        """What a report shows of runs of this task."""
        return default_views(cls.name, cls.by, runs)

    def options(self) -> dict[str, Any]:
        """The options as JSON values; two runs with the same ones ask the same questions."""
        assert dataclasses.is_dataclass(self)
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def constraints(cls) -> dict[str, Constraint]:
        """What each option may be: as its type and `option` say."""
        types = typing.get_type_hints(cls)
        assert dataclasses.is_dataclass(cls)
        return {f.name: _constraint(f"{cls.__name__}.{f.name}", types[f.name], f) for f in dataclasses.fields(cls)}

    @classmethod
    def option_fields(cls) -> list[tuple[str, Any, Any, str]]:
        """(name, type, default, help) of every option."""
        types = typing.get_type_hints(cls)
        assert dataclasses.is_dataclass(cls)
        return [(f.name, types[f.name], f.default, f.metadata["help"]) for f in dataclasses.fields(cls)]


def checked_views(task: type[Task], runs: Sequence[Run]) -> list[View]:
    """What a report shows of runs of a task; ValueError names a line that does not have what that needs."""
    for run in runs:
        for index, sample in run.samples.items():
            try:
                check_fields("sample", sample, {"tags": OBJECT, "scores": OBJECT})
                task.check(sample)
            except ValueError as error:
                raise ValueError(f"{run.where(index)}: {error}") from None
    return task.views(runs)


def default_views(name: str, by: Sequence[str], runs: Sequence[Run]) -> list[View]:
    """A table of the mean of each score by the tags `by`."""
    scores = [sample["scores"] for run in runs for sample in run.samples.values()]
    names = list(dict.fromkeys(n for s in scores for n, value in s.items() if not isinstance(value, list)))
    rows: list[list[str]] = []
    for run in runs:
        for tags, samples in group(run.samples.values(), by).items():
            found = [[s["scores"][n] for s in samples if not isinstance(s["scores"].get(n, []), list)] for n in names]
            means = [plain(estimate(values)) if values else "" for values in found]
            rows.append([run.label, *map(str, tags), str(len(samples)), *means])
    return [Table(name, ["model", *by, "samples", *names], rows, note="Mean (95 % interval).")]


def option(default: Any, help: str, *, least: int = 1, most: int = MOST) -> Any:
    """A field of a task that is an option: an int, float, str, bool or tuple of ints (tokens, such as 4K,32K).

    Whole numbers, also those of a tuple, are from `least` to `most`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "range": Whole(least, most)})


def _constraint(where: str, hint: Any, option: dataclasses.Field) -> Constraint:
    """What an option of that type may be; TypeError for a type that no option has."""
    whole = option.metadata["range"]
    known: dict[Any, Constraint] = {int: whole, float: Number(), bool: Flag(), str: Text(empty=True)}
    known |= {int | None: dataclasses.replace(whole, optional=True), tuple[int, ...]: Each(whole, kind=tuple)}
    if hint not in known:
        raise TypeError(f"{where}: an option is an int, float, str, bool or tuple of ints, not {hint}.")
    return known[hint]


def make_task(task: type[Task], **options: Any) -> Task:
    """A task with options; ValueError for one that it does not have, with the nearest."""
    known = [name for name, *_ in task.option_fields()]
    for name in options:
        if name not in known:
            raise unknown(f"option of task {task.name}", name, known)
    return task(**options)


def parse_tokens(text: str) -> int:
    """ "128K" as 131072: K is 1024, M is 1024 * 1024."""
    match = re.fullmatch(r"(\d+)([KkMm]?)", text.strip())
    if not match or not int(match[1]):
        raise ValueError(f"must be a whole number above 0, such as 20, 4096 or 128K; got {text!r}.")
    return int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()]
