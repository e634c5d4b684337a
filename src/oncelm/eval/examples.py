"""What a task asks of a model: to go on after a prompt, or how likely it finds a given continuation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Tags = Mapping[str, int | float | str]
Scores = dict[str, float | list[float]]


@dataclass(frozen=True)
class Generate:
    """Read `prompt`, write greedily.

    Attributes:
        prompt: token ids, int32 [T]. Examples in a row whose prompts begin alike are read once as far as they do.
        target: the right answer, for the record; the task's `score` judges.
        max_new_tokens: tokens to write at most.
        stop: text that ends the output, and is cut off; it may be a special token's, such as <|im_end|>; "" for none.
        tags: what the example is one of, such as {"context_length": 4096, "depth": 50}; figures are grouped by them.
    """

    prompt: np.ndarray
    target: str
    max_new_tokens: int
    stop: str = ""
    tags: Tags = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Tokens that follow the prompt."""
        return self.max_new_tokens

    def hash(self) -> str:
        return _hash(self.prompt)


@dataclass(frozen=True)
class Score:
    """Read `prompt` (at least one token), then score every token of `continuation`, int32 [T] both.

    `target` is the continuation's text where it is worth a line of the record.
    """

    prompt: np.ndarray
    continuation: np.ndarray
    target: str | None = None
    tags: Tags = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Tokens that follow the prompt."""
        return len(self.continuation)

    def hash(self) -> str:
        return _hash(self.prompt, self.continuation)


Example = Generate | Score


@dataclass(frozen=True)
class TokenScores:
    """The model's verdict on given tokens, each in view of all before it.

    Attributes:
        log_likelihoods: natural logarithm of the probability of each token, float32 [T].
        greedy: whether the token is the likeliest one, bool [T].
    """

    log_likelihoods: np.ndarray
    greedy: np.ndarray


Output = str | TokenScores  # of Generate, of Score


def _hash(*parts: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + np.ascontiguousarray(part, dtype=np.int32).tobytes())
    return digest.hexdigest()
