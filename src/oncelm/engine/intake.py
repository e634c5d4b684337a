"""What may be asked of an engine, and the requests that it makes of that."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from oncelm.data.encoding import encode_prompt
from oncelm.engine.outputs import CompletionOutput, Logprobs, RequestMetrics, RequestOutput
from oncelm.engine.params import SamplingParams
from oncelm.engine.plan import MemoryPlan
from oncelm.engine.request import Request
from oncelm.engine.structured import Grammar, Grammars
from oncelm.engine.text import TextState
from oncelm.utils.errors import check_choice, shown

Prompt = str | Sequence[int] | Mapping[str, Any]
TO_BE_KEPT = SamplingParams(max_tokens=1, temperature=0, detokenize=False)  # of a document; none of it is asked for
# Tokens before a document's end at which there is a snapshot too: where the text of a question follows it, a tokenizer
# may join the end of one with the beginning of the other
JOINED = 8


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
    if isinstance(given, bytes | bytearray):  # they are numbers, too, but hardly meant as ids
        raise ValueError(f"a prompt must be text or token ids, got {shown(given)}; decode it to text.")
    if isinstance(given, str):
        if tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; this engine has none, so give token ids.")
        check_encodable(given)
        given = encode_prompt(tokenizer, given) if given else []
    try:
        ids = [*given]
    except TypeError:
        raise ValueError(f"a prompt must be text or token ids, got {shown(given)}.") from None
    if not ids:
        raise ValueError("the prompt is empty: there has to be at least one token.")
    encoded = _encoded(ids, vocab_size)
    return PromptTokens(text, ids if type(ids[0]) is int else encoded.tolist(), encoded)


def check_encodable(text: str) -> None:
    """ValueError for text with half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        odd = text[error.start : error.start + 1]
        raise ValueError(f"a prompt must be valid Unicode, got {odd!r} at character {error.start:,}.") from None


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


class Intake:
    """Makes requests, or says why they cannot be run.

    Args:
        seed: of those that have none of their own.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int], plan: MemoryPlan, seed: int
    ) -> None:
        self.tokenizer, self.vocab_size, self.eos_token_ids, self.plan = tokenizer, vocab_size, eos_token_ids, plan
        self._seeds, self._arrivals = random.Random(seed), itertools.count()
        self._grammars: Grammars | None = None

    def requests(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float,
        priority: int = 0,
        salt: str | None = None,
    ) -> list[Request]:
        """A request for each answer; ValueError for what cannot be run."""
        tokens = read_prompt(prompt, self.tokenizer, self.vocab_size)
        max_tokens = answer_length(len(tokens.ids), params.max_tokens, self.plan)
        params.check_model(self.vocab_size, self.tokenizer is not None)
        return self._requests(request_id, tokens, params, max_tokens, arrival_time, priority, salt)

    def document(
        self, request_id: str, document: Prompt, arrival_time: float, priority: int = 0, salt: str | None = None
    ) -> Request:
        """A request whose prompt is read to its end, for which there is no answer."""
        tokens = read_prompt(document, self.tokenizer, self.vocab_size)
        length = len(tokens.ids)
        answer_length(length, 1, self.plan)
        (request,) = self._requests(request_id, tokens, TO_BE_KEPT, 0, arrival_time, priority, salt)
        if length > 2 * JOINED:
            request.cuts.add(length - JOINED)
        return request

    def _requests(
        self,
        request_id: str,
        tokens: PromptTokens,
        params: SamplingParams,
        max_tokens: int,
        arrival_time: float,
        priority: int,
        salt: str | None,
    ) -> list[Request]:
        if not isinstance(priority, int):
            raise ValueError(f"priority must be a whole number, smaller ones come first; got {shown(priority)}.")
        if not isinstance(salt, str | None):
            raise ValueError(f"cache_salt must be text, got {shown(salt)}.")
        text, ids, encoded = tokens
        grammars = [self._grammar(params) for _ in range(params.n)]
        answers = [CompletionOutput(index) for index in range(params.n)]
        asked: Logprobs | None = None if params.prompt_logprobs is None else [None]
        output = RequestOutput(request_id, text, ids, answers, False, RequestMetrics(arrival_time), asked)
        seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        number = next(self._arrivals)
        requests = []
        for answer, grammar in zip(answers, grammars, strict=True):
            state = TextState(self.tokenizer, params, ids, self.eos_token_ids, max_tokens, grammar)
            request = Request(
                output, answer, params, encoded[:], len(ids), max_tokens, seed + answer.index, state, grammar,
                priority, number, salt,
            )  # fmt: skip
            requests.append(request)
        return requests

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        """What an answer has to follow; ValueError if that is no structure."""
        if not isinstance(params.structured, dict):  # None; text has become a schema
            return None
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.vocab_size, self.eos_token_ids)
        return self._grammars(params.structured)
