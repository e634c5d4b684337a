"""What a request asks for: how tokens are chosen, when it ends, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any

import torch

from oncelm.utils.constraints import POSITIVE, Constraint, Each, Keyed, Number, OneOf, Text, Whole, constraints_of
from oncelm.utils.errors import shown, unknown
from oncelm.utils.settings import parse_json

# of the tokens so far (prompt, output) and logits [V] float32: logits [V], changed in place or new
LogitsProcessor = Callable[[Sequence[int], Sequence[int], torch.Tensor], torch.Tensor]

OUTPUT_KINDS = ("cumulative", "delta", "final_only")
ALL = -1  # log-probabilities of the whole vocabulary
STRUCTURES = ("regex", "choice", "grammar")  # kinds of structure beside a JSON schema
# names of other libraries
ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "do_sample": "temperature",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "top_logprobs": "logprobs",
    "bad_words_ids": "bad_words",
    "structured_outputs": "structured",
    "guided_decoding": "structured",
    "response_format": "structured",
    "num_beams": "beam_width (of BeamSearchParams)",
}


@dataclass(frozen=True)
class Callables(Constraint):
    """A list of functions."""

    optional: bool = False

    def check(self, name: str, value: Any) -> tuple[LogitsProcessor, ...]:
        if not isinstance(value, list | tuple) or not all(map(callable, value)):
            raise self.refuse(name, value)
        return tuple(value)

    def describe(self) -> str:
        return "a list of functions (prompt ids, output ids, logits [V]) -> logits [V]"


@dataclass(frozen=True)
class Bias(Constraint):
    """Finite numbers by token id."""

    optional: bool = False

    def check(self, name: str, value: Any) -> dict[int, float]:
        Keyed(any_keys=True)(name, value)
        return {
            Whole(0)(f"{name}: a token id", token): float(Number()(f"{name}[{token!r}]", bias))
            for token, bias in value.items()
        }


@dataclass(frozen=True)
class Structure(Constraint):
    """A JSON schema, or one of the other kinds of structure."""

    optional: bool = False

    def check(self, name: str, value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except ValueError as error:
                raise ValueError(f"{name} as text must be a JSON schema: {error}; got {shown(value)}.") from None
        if not isinstance(value, dict):
            raise self.refuse(name, value)
        kinds = [kind for kind in STRUCTURES if kind in value]
        if kinds and len(value) > 1:
            raise ValueError(f"{name}: {kinds[0]!r} stands alone, got the keys {shown(list(value))}.")
        if kinds == ["choice"]:
            choices = _Some(Text())(f"{name}['choice']", value["choice"])
            return {"choice": choices}
        if kinds:
            Text()(f"{name}[{kinds[0]!r}]", value[kinds[0]])
        return value

    def describe(self) -> str:
        return 'a JSON schema (a dict, or its text), {"regex": ...}, {"choice": [...]} or {"grammar": ...}'


@dataclass(frozen=True)
class _Some(Each):
    """A list, or tuple, of at least one value; it becomes a tuple. With `or_one`, a value by itself counts as one."""

    def check(self, name: str, value: Any) -> tuple[Any, ...]:
        if isinstance(value, list | tuple) and not value:
            raise ValueError(f"{name} must hold at least one value, got {shown(value)}.")
        found = super().check(name, value)
        return tuple(found) if isinstance(found, list | tuple) else (found,)


@dataclass(frozen=True)
class _Any(_Some):
    """The same, also of no value."""

    def check(self, name: str, value: Any) -> tuple[Any, ...]:
        return () if isinstance(value, list | tuple) and not value else super().check(name, value)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen, with vLLM's names.

    A value that is not allowed, or a name that is not known, is a ValueError at once. Lists are kept as tuples.
    In which order the options count: `Sampler` (engine/sampler.py).

    Attributes:
        n: answers to one prompt, which is read once. Answer i draws with `seed + i`.
        max_tokens: tokens to write at most; None: as many as the model's length allows.
        min_tokens: before these, no end-of-text token is written and no stop string ends the text.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0 or -1: all.
        top_p: draw among the likeliest whose probabilities sum up to p.
        min_p: leave out tokens less likely than this share of the likeliest.
        repetition_penalty, presence_penalty, frequency_penalty: as vLLM's and OpenAI's: the first over prompt and
            output, the others over the output.
        seed: the same draws whatever else runs; None draws another one.
        stop: texts that end the answer, which is cut before them.
        stop_token_ids: tokens that end the answer.
        include_stop_str_in_output: do not cut.
        ignore_eos: go on behind the end-of-text token.
        logprobs: of the chosen token, and of so many likeliest ones, at every place of the output; -1: of all.
        prompt_logprobs: the same at every place of the prompt but the first.
        logit_bias: added to the logits of these tokens.
        allowed_token_ids: no others are chosen.
        bad_words: texts that are not written, as far as they are spelled with their own tokens.
        logits_processors: functions that change the logits, in order.
        structured: a JSON schema (a dict or a string), {"regex": ...}, {"choice": [...]} or {"grammar": ...}.
        skip_special_tokens: in the text of the output.
        detokenize: make text at all.
        output_kind: of `AsyncLLM.generate` and `LLM.stream`: "cumulative" outputs have all that was written so far,
            "delta" ones what is new; "final_only": the last output alone.
    """

    n: Annotated[int, Whole(1)] = 1
    max_tokens: Annotated[int, Whole(1)] | None = 16
    min_tokens: Annotated[int, Whole(0)] = 0
    temperature: Annotated[float, Number(0)] = 1.0
    top_k: Annotated[int, Whole(-1)] = 0
    top_p: Annotated[float, Number(0, 1, open_low=True)] = 1.0
    min_p: Annotated[float, Number(0, 1)] = 0.0
    repetition_penalty: Annotated[float, POSITIVE] = 1.0
    presence_penalty: Annotated[float, Number(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Number(-2, 2)] = 0.0
    seed: Annotated[int, Whole(-(2**63))] | None = None
    stop: Annotated[str | Sequence[str] | None, _Any(Text(), or_one=True)] = None
    stop_token_ids: Annotated[Sequence[int] | None, _Any(Whole(0))] = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Annotated[int, Whole(ALL)] | None = None
    prompt_logprobs: Annotated[int, Whole(ALL)] | None = None
    logit_bias: Annotated[dict[int, float] | None, Bias()] = None
    allowed_token_ids: Annotated[Sequence[int] | None, _Some(Whole(0))] = None
    bad_words: Annotated[Sequence[str] | None, _Any(Text())] = None
    logits_processors: Annotated[Sequence[LogitsProcessor] | None, Callables()] = None
    structured: Annotated[dict[str, Any] | str | None, Structure()] = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    output_kind: Annotated[str, OneOf(OUTPUT_KINDS)] = "cumulative"

    def __new__(cls, *values: Any, **named: Any) -> SamplingParams:
        for name in named.keys() - CONSTRAINTS.keys():
            if name in ELSEWHERE:
                raise ValueError(f"SamplingParams has no {name!r}: here it is {ELSEWHERE[name]}.")
            raise unknown("sampling parameter", name, CONSTRAINTS)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, constraint in CONSTRAINTS.items():
            value = getattr(self, name)
            if value is not DEFAULTS[name]:
                object.__setattr__(self, name, constraint(name, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}.")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop needs the text: set detokenize=True, or use stop_token_ids; got {self.stop!r}.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @cached_property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def takes_likeliest(self) -> bool:
        """Whether the choice is the likeliest token of the model's own logits."""
        return (
            self.is_greedy
            and not (self.has_penalties or self.min_tokens)
            and not (self.logit_bias or self.allowed_token_ids or self.bad_words)
            and not (self.logits_processors or self.structured is not None)
        )

    @cached_property
    def looks_back(self) -> bool:
        """Whether a token is chosen by more than its logits and its place in the output."""
        return self.has_penalties or bool(self.bad_words or self.logits_processors) or self.structured is not None

    def check_model(self, vocab_size: int, has_tokenizer: bool) -> None:
        """Raise ValueError for what a model with so many tokens, and with or without a tokenizer, cannot do."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise ValueError(f"{name}: the model has {vocab_size} tokens (0 to {vocab_size - 1}), got {token}.")
        for name in ("stop", "bad_words"):
            if getattr(self, name) and not has_tokenizer:
                raise ValueError(f"{name} needs a tokenizer; this engine has none, got {shown(getattr(self, name))}.")


def as_params(given: SamplingParams | None) -> SamplingParams:
    """What was given, or the defaults; ValueError for anything else."""
    if given is None:
        return SamplingParams()
    if not isinstance(given, SamplingParams):
        raise ValueError(f"sampling_params must be a SamplingParams, got {shown(given)}.")
    return given


CONSTRAINTS = constraints_of(SamplingParams)
DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
