"""Workloads that are common, drawn from a seed: `uniform:requests=32,input=32768,output=256`.

Where a length is LOW-HIGH, such as input=512-32K, each is drawn between them, evenly on a logarithmic scale.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from oncelm.bench.serve.workload import MOST_TOKENS, Conversation, Turn
from oncelm.utils.constraints import Number, Whole
from oncelm.utils.errors import check_choice

Lengths = int | tuple[int, int]
MOST_REQUESTS = 1_000_000


def uniform(
    rng: np.random.Generator, *, requests: int = 32, input: Lengths = 8192, output: Lengths = 256, rate: float = 0
) -> list[Conversation]:
    """Requests with nothing in common; `rate` of them a second (Poisson), 0: all at once."""
    return [
        Conversation((Turn(_draw(rng, input), _draw(rng, output)),), arrival)
        for arrival in _arrivals(rng, requests, rate)
    ]


def documents(
    rng: np.random.Generator,
    *,
    documents: int = 4,
    document: Lengths = 32768,
    questions: int = 8,
    input: Lengths = 64,
    output: Lengths = 128,
    rate: float = 0,
) -> list[Conversation]:
    """Questions, `questions` on each document, in any order: prompts of one document begin alike."""
    lengths = [_draw(rng, document) for _ in range(documents)]
    asked = rng.permutation(np.repeat(np.arange(documents), questions))
    return [
        Conversation(
            (Turn(_draw(rng, input), _draw(rng, output)),), arrival, f"document {which}", prefix_length=lengths[which]
        )
        for which, arrival in zip(asked.tolist(), _arrivals(rng, len(asked), rate), strict=True)
    ]


def chat(
    rng: np.random.Generator,
    *,
    conversations: int = 16,
    turns: int = 4,
    system: int = 0,
    input: Lengths = 256,
    output: Lengths = 128,
    think: float = 1,
    rate: float = 0,
) -> list[Conversation]:
    """Conversations of several turns, behind one system prompt of `system` tokens.

    `think`: mean seconds before a turn (exponential); `rate`: conversations a second.
    """
    found = []
    for arrival in _arrivals(rng, conversations, rate):
        said = tuple(
            Turn(_draw(rng, input), _draw(rng, output), float(rng.exponential(think)) if turn and think else 0.0)
            for turn in range(turns)
        )
        found.append(Conversation(said, arrival, "system" if system else None, system))
    return found


GENERATORS: dict[str, Callable[..., list[Conversation]]] = {"uniform": uniform, "documents": documents, "chat": chat}
NUMBERS = {
    **dict.fromkeys(("requests", "documents", "questions", "conversations", "turns"), Whole(1, MOST_REQUESTS)),
    **dict.fromkeys(("input", "output", "document"), Whole(1, MOST_TOKENS)),
    "system": Whole(0, MOST_TOKENS),
    "rate": Number(0, 1e6),
    "think": Number(0, 1e6),
}
RANGES = ("input", "output", "document")


def generate(spec: str, seed: int = 0) -> list[Conversation]:
    """The workload that NAME:KEY=VALUE,KEY=VALUE names; equal seeds give equal ones.

    Raises:
        ValueError: no such generator, key or value.

    >>> [conversation.turns[0] for conversation in generate("uniform:requests=2,input=1K,output=16")]
    [Turn(input=1024, output=16, think=0.0), Turn(input=1024, output=16, think=0.0)]
    """
    name, _, settings = spec.partition(":")
    check_choice("workload", name, (*GENERATORS, "a JSONL file"))
    if name not in GENERATORS:
        raise ValueError(f"workload {spec!r}: no such file.")
    make = GENERATORS[name]
    keys = [key for key in inspect.signature(make).parameters if key != "rng"]
    values = {}
    for setting in filter(None, settings.split(",")):
        key, _, text = setting.partition("=")
        check_choice(f"key of workload {name}", key, keys)
        values[key] = _value(key, text)
    return make(np.random.default_rng(seed), **values)


def _value(key: str, text: str) -> Any:
    """A number with K or M behind it, or a range of such."""
    low, dash, high = text.partition("-")
    if dash and low and key in RANGES:
        between = (_number(key, low), _number(key, high))
        if between[0] > between[1]:
            raise ValueError(f"{key}={text}: a range goes from the smaller to the larger.")
        return between
    return _number(key, text)


def _number(key: str, text: str) -> int | float:
    match = re.fullmatch(r"(\d+)([KM]?)|\d*\.\d+", text)
    if match is None:
        raise ValueError(f"{key}={text}: a number, such as 20, 4096 or 128K{_or_a_range(key)}.")
    value: int | float = int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]] if match[1] else float(text)
    return NUMBERS[key](key, value)


def _or_a_range(key: str) -> str:
    return ", or a range, such as 512-32K" if key in RANGES else ""


def _arrivals(rng: np.random.Generator, count: int, rate: float) -> list[float]:
    """Seconds from the start: the first at 0."""
    if not rate:
        return [0.0] * count
    gaps = rng.exponential(1 / rate, count)
    return (np.cumsum(gaps) - gaps[0]).tolist()


def _draw(rng: np.random.Generator, lengths: Lengths) -> int:
    if isinstance(lengths, int):
        return lengths
    low, high = lengths
    return min(high, max(low, round(math.exp(rng.uniform(math.log(low), math.log(high))))))
