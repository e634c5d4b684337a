"""A place in an output, whose token the sampler chooses, and what it chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from oncelm.engine.outputs import Logprob
from oncelm.engine.params import SamplingParams

if TYPE_CHECKING:
    from oncelm.engine.structured import Grammar


class Memo:
    """What the sampler keeps of an answer between its tokens. The request makes it, the sampler fills it.

    Attributes:
        counts: the row of its tokens' counts (`Penalties`); None: none yet.
        counted: the tokens of the output in it.
        bias: added to the logits at every place, [V] float32.
        bad_words: the token ids of what must not be written.
        is_flat: its probabilities were spread over so many tokens that top_p needs all of them sorted.
    """

    def __init__(self) -> None:
        self.counts: int | None = None
        self.counted = 0
        self.bias: torch.Tensor | None = None
        self.bad_words: list[list[int]] | None = None
        self.is_flat = False


@dataclass(slots=True)
class SamplingRow:
    """A place whose token is to be chosen.

    Attributes:
        seed: of this answer's draws.
        index: of the place in the output, 0 for the first token.
        prompt, output: the tokens before it; those of the output with its drafts.
        grammar: the structure that the output must have, behind the sure tokens.
        num_drafts: how many of the output's last tokens are drafts.
        memo: of the answer, the same one at each of its places; without it nothing is kept.
    """

    params: SamplingParams
    seed: int
    index: int
    prompt: Sequence[int]
    output: Sequence[int]
    grammar: Grammar | None = None
    num_drafts: int = 0
    memo: Memo = field(default_factory=Memo)

    @property
    def num_sure(self) -> int:
        return len(self.output) - self.num_drafts

    @property
    def drafts(self) -> Sequence[int]:
        return self.output[self.num_sure :] if self.num_drafts else ()


@dataclass(slots=True)
class Sampled:
    """What was chosen at a place.

    Attributes:
        token: -1 where there is an error.
        logprobs: of the chosen token and the likeliest, if the parameters ask for them.
        error: why there is no token.
        is_broken: that is since the model's own logits are not finite.
        is_late: the device chose another one first, which was to be corrected.
    """

    token: int
    logprobs: dict[int, Logprob] | None = None
    error: str | None = None
    is_broken: bool = False
    is_late: bool = field(default=False, compare=False)
