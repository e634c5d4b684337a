"""Beam search: of all continuations of a prompt, the likeliest ones are followed side by side, as in transformers.

Each step is one request a beam, of one token and its likeliest alternatives; what beams have in common is read once,
through the prefix cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oncelm.data.detokenize import text_stream
from oncelm.engine.outputs import CompletionOutput, Logprob, RequestOutput
from oncelm.engine.params import SamplingParams
from oncelm.utils.constraints import Number, OneOf, Whole, check_all, constraints_of
from oncelm.utils.errors import shown

if TYPE_CHECKING:
    from oncelm.engine.llm import LLM


@dataclass(frozen=True)
class BeamSearchParams:
    """How beams are followed; a value that is not allowed is a ValueError at once.

    Attributes:
        beam_width: beams, and answers.
        max_tokens: of an answer.
        length_penalty: an answer's score is its log-probability, divided by its number of tokens to this power.
        early_stopping: True ends with `beam_width` complete answers; False, when the best beam as it is now is worse
            than all of them; "never", when no continuation could be better.
        ignore_eos: go on behind the end-of-text token.
    """

    beam_width: Annotated[int, Whole(1)] = 4
    max_tokens: Annotated[int, Whole(1)] = 16
    length_penalty: Annotated[float, Number()] = 1.0
    early_stopping: Annotated[bool | Literal["never"], OneOf((True, False, "never"))] = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check_all(vars(self), CONSTRAINTS)


CONSTRAINTS = constraints_of(BeamSearchParams)


@dataclass(frozen=True)
class Beam:
    """Tokens behind the prompt, and the sum of their log-probabilities."""

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0


class Search:
    """The beams of one prompt.

    Attributes:
        running: beams to be continued, the likeliest first.
        finished: complete answers with their scores, the best first.
        is_done: whether nothing that comes could change these.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Collection[int]) -> None:
        self.params = params
        self.eos_token_ids = set() if params.ignore_eos else set(eos_token_ids)
        self.running, self.finished, self.is_done = [Beam()], list[tuple[float, Beam]](), False
        # so many that `beam_width` go on even where each beam has all of its ends among them
        self.num_continuations = max(2, 1 + len(self.eos_token_ids)) * params.beam_width

    def step(self, continuations: Sequence[dict[int, Logprob]]) -> None:
        """Go on, with the log-probabilities of the likeliest tokens behind each running beam."""
        params = self.params
        longer = [
            Beam((*beam.tokens, token), beam.logprob + logprob.logprob)
            for beam, table in zip(self.running, continuations, strict=True)
            for token, logprob in table.items()
        ]
        best = heapq.nlargest(self.num_continuations, longer, key=lambda beam: beam.logprob)
        length = len(best[0].tokens)
        ended = [beam for beam in best[: params.beam_width] if self._ends(beam)]
        self.finished += ((beam.logprob / length**params.length_penalty, beam) for beam in ended)
        self.finished = heapq.nlargest(params.beam_width, self.finished, key=lambda scored: scored[0])
        self.running = [beam for beam in best if not self._ends(beam)][: params.beam_width]
        self.is_done = not self.running or self._cannot_improve(length)

    def _ends(self, beam: Beam) -> bool:
        return beam.tokens[-1] in self.eos_token_ids or len(beam.tokens) == self.params.max_tokens

    def _cannot_improve(self, length: int) -> bool:
        params = self.params
        if len(self.finished) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = params.max_tokens
        return self.running[0].logprob / length**params.length_penalty <= self.finished[-1][0]


def beam_search(llm: LLM, prompts: Any, params: BeamSearchParams | None = None) -> list[RequestOutput]:
    """The likeliest answers to prompts, as `model.generate(num_beams=...)` finds them; the best first.

    Args:
        llm: what runs the requests.
        prompts: as for `LLM.generate`.

    Returns:
        for each prompt an output with `beam_width` answers; their tokens have the end-of-text token, where one came.

    Raises:
        ValueError: a prompt that cannot be run, or whose answer does not fit.
        RuntimeError: a step failed, as where memory runs out.
    """
    params = BeamSearchParams() if params is None else params
    if not isinstance(params, BeamSearchParams):
        raise ValueError(f"params must be a BeamSearchParams, got {shown(params)}.")
    eos_token_ids = llm.engine.eos_token_ids
    count = Search(params, eos_token_ids).num_continuations
    asked = SamplingParams(temperature=0, max_tokens=1, logprobs=count, detokenize=False)
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    most = min(llm.engine.plan.max_model_len, llm.engine.plan.num_tokens)
    longest = max((len(output.prompt_token_ids) for output in outputs), default=0)
    if longest + params.max_tokens > most:
        raise ValueError(
            f"a prompt of {longest:,} tokens and max_tokens={params.max_tokens:,} are more than the {most:,} that fit."
        )
    searches = [Search(params, eos_token_ids) for _ in outputs]
    for output, search in zip(outputs, searches, strict=True):
        search.step(_continuations([output]))
    while going := [i for i, search in enumerate(searches) if not search.is_done]:
        texts = [[*outputs[i].prompt_token_ids, *beam.tokens] for i in going for beam in searches[i].running]
        found = iter(llm.generate([{"prompt_token_ids": text} for text in texts], asked, use_tqdm=False))
        for i in going:
            searches[i].step(_continuations([next(found) for _ in searches[i].running]))
    for output, search in zip(outputs, searches, strict=True):
        output.outputs = [_answer(llm, output, search, i) for i in range(len(search.finished))]
    return outputs


def _continuations(outputs: Sequence[RequestOutput]) -> list[dict[int, Logprob]]:
    """The log-probabilities in answers of one token; RuntimeError for an answer that failed."""
    tables = []
    for answer in (output.outputs[0] for output in outputs):
        if answer.error is not None or not answer.logprobs or answer.logprobs[0] is None:
            raise RuntimeError(f"beam search: a step failed: {answer.error}")
        tables.append(answer.logprobs[0])
    return tables


def _answer(llm: LLM, output: RequestOutput, search: Search, index: int) -> CompletionOutput:
    beam = search.finished[index][1]
    text = ""
    if llm.tokenizer is not None:
        stream = text_stream(llm.tokenizer, output.prompt_token_ids)
        text = "".join(map(stream.add, beam.tokens)) + stream.end()
    reason = "stop" if beam.tokens[-1] in search.eos_token_ids else "length"
    return CompletionOutput(index, text, list(beam.tokens), beam.logprob, finish_reason=reason)
