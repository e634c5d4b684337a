"""What comes out of the engine, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Of a token at a place: its log-probability, its rank among all (1: the likeliest), and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = list[dict[int, Logprob] | None]  # a place; None where nothing comes before (the first of a prompt)


@dataclass
class CompletionOutput:
    """One answer, as far as it has come.

    Attributes:
        index: among the `n` of its request.
        finish_reason: "stop", "length", "abort", "error"; None: not finished.
        stop_reason: the stop string or token that ended it; None: the end-of-text token, or none.
        error: in words, why the answer failed ("error").
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of the engine's clock; None: not yet.

    Attributes:
        token_times: when each token of the first answer was there.
        num_preemptions: how often it lost its memory to others and was read again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    token_times: list[float] = field(default_factory=list)
    num_preemptions: int = 0


@dataclass
class RequestOutput:
    """A request and its answers, as far as they have come.

    Attributes:
        num_cached_tokens: of the prompt, that the prefix cache had.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: Logprobs | None = None
    num_cached_tokens: int = 0
