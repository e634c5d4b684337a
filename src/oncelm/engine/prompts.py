"""What may be asked of an engine: prompts as text or tokens, and answers that fit behind them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from oncelm.data.encoding import encode_prompt
from oncelm.engine.plan import MemoryPlan
from oncelm.utils.errors import check_choice, shown

Prompt = str | Sequence[int] | Mapping[str, Any]


class PromptTokens(NamedTuple):
    """A prompt.

    Attributes:
        text: that it was given as, or with.
        ids: of its tokens.
        encoded: the same as int32.
    """

    text: str | None
    ids: list[int]
    encoded: array[int]


def read_prompt(prompt: Prompt, tokenizer: Any, vocab_size: int) -> PromptTokens:
    """A prompt of text (which needs the tokenizer), of token ids, or of both.

    Raises:
        ValueError: no tokens, or such as a model with so many does not have.
    """
    given: Any = prompt
    if isinstance(prompt, Mapping):
        for name in prompt:
            check_choice("key of a prompt", name, ("prompt", "prompt_token_ids"))
        given = prompt.get("prompt_token_ids", prompt.get("prompt"))
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt if isinstance(prompt, str) else None
    if isinstance(given, str):
        if tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; this engine has none, so give token ids.")
        given = encode_prompt(tokenizer, given) if given else []
    try:
        ids = [*given]
    except TypeError:
        raise ValueError(f"a prompt must be text or token ids, got {shown(given)}.") from None
    if not ids:
        raise ValueError("the prompt is empty: there has to be at least one token.")
    encoded = _encoded(ids, vocab_size)
    return PromptTokens(text, ids if type(ids[0]) is int else encoded.tolist(), encoded)


def _encoded(ids: list[int], vocab_size: int) -> array[int]:
    """The ids as int32, checked there: to go through a list of a hundred thousand takes milliseconds each time."""
    try:
        encoded = array("i", ids)
        numbers = np.frombuffer(encoded, np.int32)
        fits = numbers.min() >= 0 and numbers.max() < vocab_size
        fits = fits and not any(isinstance(ids[place], bool) for place in np.flatnonzero(numbers < 2))
    except (TypeError, OverflowError):
        fits = False
    if not fits:
        odd = next(
            token
            for token in ids
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < vocab_size
        )
        raise ValueError(f"token ids must be whole numbers from 0 to {vocab_size - 1}, got {shown(odd)}.")
    return encoded


def answer_length(length: int, max_tokens: int | None, plan: MemoryPlan) -> int:
    """Tokens of the answer to a prompt of `length` tokens: `max_tokens`, or as many as fit.

    Raises:
        ValueError: they do not fit; with the number that would.
    """
    most, why = plan.max_model_len, f"max_model_len={plan.max_model_len:,}"
    if plan.num_tokens < most:
        most, why = plan.num_tokens, f"the memory planned for {plan.num_tokens:,} tokens"
    if length >= most:
        raise ValueError(
            f"the prompt has {length:,} tokens; with {why}, at most {most - 1:,} fit beside one token of an answer."
        )
    if max_tokens is None:
        return most - length
    if length + max_tokens > most:
        raise ValueError(
            f"a prompt of {length:,} tokens and max_tokens={max_tokens:,} are more than {why} allows; "
            f"max_tokens={most - length:,} would fit (None: as many as fit)."
        )
    return max_tokens
