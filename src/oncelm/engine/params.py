"""What a request asks for: how tokens are chosen, when it ends, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# of the tokens so far (prompt, output) and logits [V] float32: logits [V], changed in place or new
LogitsProcessor = Callable[[Sequence[int], Sequence[int], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen, with vLLM's names.

    Attributes:
        n: answers to one prompt, which is read once.
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
        logprobs: of the chosen token, and of so many likeliest ones, at every place of the output.
        prompt_logprobs: the same at every place of the prompt but the first.
        logit_bias: added to the logits of these tokens.
        allowed_token_ids: no others are chosen.
        bad_words: texts that are not written.
        logits_processors: functions that change the logits, in order.
        structured: a JSON schema (a dict or a string), {"regex": ...}, {"choice": [...]} or {"grammar": ...}.
        skip_special_tokens: in the text of the output.
        detokenize: make text at all.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    structured: dict[str, Any] | str | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
