"""Passkey retrieval (Landmark attention, arXiv 2305.16300, as LongLLaMA uses it, arXiv 2307.03170, section 4.2).

A number stands once in a long text of five sentences over and over; at the end it is asked for. The task says how far
back a model can look for one thing, and nothing about what else it understands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from oncelm.eval.runner import Example

DESCRIPTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST_KEY = 50_000


def examples(
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    depths: Sequence[float | None] = (None,),
    trials: int = 20,
    seed: int = 0,
) -> Iterator[Example]:
    """Examples of each length, at each depth, `trials` each.

    Args:
        lengths: tokens of the prompt; reached to within a few.
        depths: where the pass key stands, in percent of the filler; None draws the place anew in each trial.
        trials: examples of each length and depth; trial i depends on (seed, i, length, depth) alone.

    Raises:
        ValueError: a length that has no room for the prompt, a depth outside 0..100, no trial.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    for depth in depths:
        if depth is not None and not 0 <= depth <= 100:
            raise ValueError(f"depths are percents from 0 to 100, got {depth}.")
    example(tokenizer, min(lengths), depths[0], seed, 0)  # too short a length shows at once
    return (
        example(tokenizer, length, depth, seed, trial)
        for length in lengths
        for depth in depths
        for trial in range(trials)
    )


def example(tokenizer: PreTrainedTokenizerBase, length: int, depth: float | None, seed: int, trial: int) -> Example:
    """The example of one trial."""
    rng = np.random.default_rng([seed, trial, length, -1 % 2**32 if depth is None else round(1000 * depth)])
    answer = str(rng.integers(1, LARGEST_KEY))
    share = rng.random() if depth is None else depth / 100

    def ids(characters: int) -> list[int]:
        return tokenizer(prompt(characters, share, answer)).input_ids

    shortest = len(ids(0))
    if shortest > length:
        raise ValueError(f"a passkey prompt has at least {shortest} tokens, asked for {length}.")
    per_token = 1000 * len(FILLER) / len(tokenizer(FILLER * 1000, add_special_tokens=False).input_ids)
    characters = int((length - shortest) * per_token)
    found = ids(characters)
    while len(found) > length:  # the cuts of the filler may cost a token or two
        characters -= max(1, int((len(found) - length) * per_token))
        found = ids(max(0, characters))
    key: dict[str, Any] = {"length": length, "depth": depth, "seed": seed, "trial": trial}
    room = len(tokenizer(f" {answer}", add_special_tokens=False).input_ids)
    return Example(key, found, answer, max_new_tokens=room + 2)


def prompt(characters: int, share: float, key: str) -> str:
    """The text with `characters` of filler, the pass key after `share` of them."""
    before = int(characters * share)
    filler = FILLER * (characters // len(FILLER) + 1)
    return "\n".join((DESCRIPTION, filler[:before], NEEDLE.format(key=key), filler[: characters - before], QUESTION))


def score(asked: Example, output: str) -> bool:
    """Whether the output starts with the pass key: that number, and not one that only begins like it."""
    found = re.match(r"\s*(\d+)", output)
    return found is not None and found[1] == asked.answer
