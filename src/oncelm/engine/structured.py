"""Answers of a given structure: at each place, only tokens with which the structure can still be completed.

Which tokens these are is llguidance's to say (`pip install 'oncelm[structured]'`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from oncelm.engine.params import STRUCTURES
from oncelm.utils.device import send
from oncelm.utils.errors import shown

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

KEPT = 64  # compiled grammars, for the next request that asks for the same
WORD = 32  # tokens of a mask in one whole number


class Grammars:
    """Makes the grammars of requests. Made once for a model and its tokenizer, which takes up to a second.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: the tokenizer has no end-of-text token, or is not a fast one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ImportError(
                f"structured output needs llguidance: pip install 'oncelm[structured]' ({error})"
            ) from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"structured output needs a fast tokenizer, got {shown(tokenizer)}.")
        if not eos_token_ids:
            raise ValueError("structured output needs a tokenizer with an end-of-text token.")
        self._vocab_size = vocab_size
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=[*eos_token_ids])
        # of a text: answers of one request share it, so do its repetitions
        self._compile = lru_cache(KEPT)(self._compiled)

    def __call__(self, structured: dict[str, Any]) -> Grammar:
        """The grammar of one answer, of `SamplingParams.structured`; ValueError with what is wrong with it."""
        return Grammar(self._compile(json.dumps(structured)).deep_copy(), self._vocab_size)

    def _compiled(self, structured: str) -> LLMatcher:
        from llguidance import LLMatcher, grammar_from

        asked = json.loads(structured)
        kind: Any = next((kind for kind in STRUCTURES if kind in asked), "json_schema")
        text = structured if kind == "json_schema" else asked[kind]
        try:
            grammar = grammar_from(kind, json.dumps(text) if kind == "choice" else text)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
            reason = matcher.get_error()
        except ValueError as error:
            reason = str(error)
        if reason:
            raise ValueError(f"structured: this {kind} cannot be used: {reason.strip()}; got {shown(asked)}.")
        return matcher


class Grammar:
    """What may come next in an answer of a structure."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def finished(self) -> bool:
        """Whether the structure is complete and nothing but the end can follow."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Go on behind a token. ValueError if it is not allowed."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} does not fit the structure: {self._matcher.get_error()}")

    def allowed(self, drafts: Sequence[int] = ()) -> np.ndarray:
        """A bit a token, in [ceil(V / 32)] int32: which may come behind the drafts.

        Behind drafts that do not fit, it does not matter, and all may. ValueError if the structure turns out to be too
        complex.
        """
        words = np.full(-(-self._vocab_size // WORD), -1, dtype=np.int32)
        fitting = self._matcher.try_consume_tokens(list(drafts)) if drafts else 0
        if fitting == len(drafts):
            words[:] = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)[: len(words)]
            if self._matcher.is_error():
                raise ValueError(f"the structure cannot be followed: {self._matcher.get_error()}")
        if fitting:
            self._matcher.rollback(fitting)
        return words


def forbid(logits: torch.Tensor, allowed: Sequence[np.ndarray]) -> torch.Tensor:
    """Logits [m, V] with -inf where a row's `Grammar.allowed` has no bit."""
    words = send(np.stack(allowed), torch.int32, logits.device)
    bits = words[:, :, None] >> torch.arange(WORD, dtype=torch.int32, device=logits.device) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))
