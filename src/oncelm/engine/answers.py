"""Answers as they grow: the places whose tokens are chosen, what a token adds, and where it ends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from oncelm.engine.places import Sampled, SamplingRow
from oncelm.engine.request import Request
from oncelm.engine.work import Row

# finish_reason and stop_reason, as in CompletionOutput; behind "error" what went wrong
Ending = tuple[str | None, int | str | None]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, as the model's folder and its tokenizer say."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*stated] if isinstance(stated, list | tuple) else [stated]
    return frozenset(token for token in (*found, getattr(tokenizer, "eos_token_id", None)) if token is not None)


def places_of(request: Request, row: Row) -> list[SamplingRow]:
    """The places of a row whose tokens are to be chosen: behind its last sure token, and behind each draft."""
    params, output, prompt = request.params, request.answer.token_ids, request.output.prompt_token_ids
    index = len(output) + request.num_unread - 1  # the row itself is one of those that are not read
    places = [SamplingRow(params, request.seed, index, prompt, output, request.grammar, 0, request.memo)]
    for count in range(1, row.num_logits):
        drafted = [*output, *row.tokens[row.kept : row.kept + count]]
        places.append(
            SamplingRow(params, request.seed, index + count, prompt, drafted, request.grammar, count, request.memo)
        )
    return places


def append_token(request: Request, sampled: Sampled, now: float, eos_token_ids: Collection[int]) -> Ending:
    """Add a token to an answer. Its text is made later (`add_text`), unless it decides where the answer ends."""
    token, params, answer = sampled.token, request.params, request.answer
    request.tokens.append(token)
    answer.token_ids.append(token)
    if sampled.logprobs is not None:
        answer.logprobs = answer.logprobs or []
        answer.logprobs.append(sampled.logprobs)
        answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + sampled.logprobs[token].logprob
    if not answer.index:
        metrics = request.output.metrics
        metrics.token_times.append(now)
        if metrics.first_token_time is None:
            metrics.first_token_time = now
    if params.stop or request.grammar is not None:
        return add_text(request)
    if token in eos_token_ids and not params.ignore_eos:
        return "stop", None
    if params.stop_token_ids and token in params.stop_token_ids:
        return "stop", token
    return ("length" if len(answer.token_ids) == request.max_tokens else None), None


def add_text(request: Request) -> Ending:
    """Turn the tokens of an answer that are not text yet into text. What its tokenizer raises is its own affair."""
    reason, stop = None, None
    answer, told = request.answer, request.num_told
    request.num_told = len(answer.token_ids)
    if request.text.is_silent:
        return reason, stop
    try:
        for token in answer.token_ids[told:]:
            _, reason, stop = request.text.append(token)
        if answer.finish_reason in ("abort", "error"):
            request.text.end()  # what was held back comes out: no token follows
    except Exception as error:
        reason, stop = "error", f"the text of the answer cannot be made: {type(error).__name__}: {error}"
    answer.text = request.text.text
    return reason, stop
