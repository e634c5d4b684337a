"""A workload: which requests come when, how long they are, what they share. As objects, and as lines of a file.

A file has a JSON object a line, for a conversation or, as most are, a single request:

    {"arrival": 0.5, "input": 512, "output": 64}
    {"arrival": 2, "input": 40, "output": 64, "prefix": "a book", "prefix_length": 131072, "priority": 1}
    {"input": "Once upon a time", "output": 32, "turns": [{"input": " And then?", "output": 32, "think": 5}]}

`input` is a number of tokens, or the text itself. Further turns follow each `think` seconds behind the answer before;
their prompt is all that was said so far and their own input.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oncelm.utils.constraints import LARGEST, Number, Text, Whole
from oncelm.utils.errors import check_choice, shown
from oncelm.utils.files import atomic_file
from oncelm.utils.settings import parse_json

MOST_TOKENS = 1 << 31
SECONDS = Number(0, 1e9)
TURN = {"output": Whole(1, MOST_TOKENS), "think": SECONDS}
CONVERSATION = {
    "arrival": SECONDS,
    "prefix": Text(optional=True),
    "prefix_length": Whole(0, MOST_TOKENS),
    "priority": Whole(-LARGEST),
}


@dataclass(frozen=True)
class Turn:
    """What is said, and how many tokens are answered.

    Attributes:
        input: tokens, or the text.
        output: tokens.
        think: seconds between the answer before and this; not of a first turn.
    """

    input: int | str
    output: int
    think: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """A request, or several turns that build on each other.

    Attributes:
        turns: one at least.
        arrival: of the first, in seconds from the start.
        prefix: the name of a text that its prompt begins with, as others' with the same name; None: none.
        prefix_length: tokens of it; others may begin with more or fewer of the same.
        priority: the engine's; an address is not told it.
    """

    turns: tuple[Turn, ...]
    arrival: float = 0.0
    prefix: str | None = None
    prefix_length: int = 0
    priority: int = 0

    @property
    def is_text(self) -> bool:
        return isinstance(self.turns[0].input, str)

    @property
    def num_tokens(self) -> int:
        """That the last turn ends at; text counts as nothing."""
        return self.prefix_length + sum(
            turn.output + (turn.input if isinstance(turn.input, int) else 0) for turn in self.turns
        )


def read_workload(path: str | os.PathLike[str]) -> list[Conversation]:
    """The conversations of a file; ValueError names a line that is none, and what is wrong with it."""
    conversations = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            try:
                conversations.append(_conversation(parse_json(line)))
            except ValueError as error:
                raise ValueError(f"line {number} of {path}: {error}") from error
    if not conversations:
        raise ValueError(f"{path} has no requests: a JSON object a line, such as {_EXAMPLE}")
    return conversations


_EXAMPLE = '{"arrival": 0.5, "input": 512, "output": 64}'


def write_workload(path: str | os.PathLike[str], conversations: Sequence[Conversation]) -> None:
    """Write a file that `read_workload` reads; what is as by default is left out."""
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in map(_plain, conversations)), encoding="utf-8")


def _plain(conversation: Conversation) -> dict[str, Any]:
    first, *others = map(asdict, conversation.turns)
    of_all = {name: value for name in CONVERSATION if (value := getattr(conversation, name)) not in (None, 0)}
    said = {name: first[name] for name in ("input", "output")}
    return {**of_all, **said, **({"turns": others} if others else {})}


def _conversation(line: Any) -> Conversation:
    if not isinstance(line, Mapping):
        raise ValueError(f"not a JSON object, such as {_EXAMPLE}, but {shown(line)}.")
    allowed = [*CONVERSATION, "input", "output", "turns"]
    for key in line:
        check_choice("key", key, allowed)
    turns = (_turn({name: line[name] for name in ("input", "output") if name in line}), *_further(line))
    values = {name: check(name, line[name]) for name, check in CONVERSATION.items() if name in line}
    conversation = Conversation(turns, **values)
    if len({isinstance(turn.input, str) for turn in turns}) == 2:
        raise ValueError("input must be text in all turns, or a number of tokens in all.")
    if (conversation.prefix is None) != (conversation.prefix_length == 0):
        raise ValueError("prefix and prefix_length go together: the name of a shared text, and its tokens.")
    if conversation.is_text and conversation.prefix:
        raise ValueError("prefix goes with an input of so many tokens; write a shared text into the input itself.")
    return conversation


def _further(line: Mapping[str, Any]) -> Iterator[Turn]:
    turns = line.get("turns", [])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"turns must be a list of objects with input and output, got {shown(turns)}.")
    for turn in turns:
        for key in turn:
            check_choice("key of a turn", key, ("input", *TURN))
        yield _turn(turn)


def _turn(values: Mapping[str, Any]) -> Turn:
    for name in ("input", "output"):
        if name not in values:
            raise ValueError(f"{name} is missing: {_EXAMPLE}")
    said = values["input"]
    check = Text() if isinstance(said, str) else Whole(1, MOST_TOKENS)
    rest = {name: check(name, values[name]) for name, check in TURN.items() if name in values}
    return Turn(check("input", said), **rest)
