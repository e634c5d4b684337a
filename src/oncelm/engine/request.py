"""A request on its way through the engine: its tokens, its memory, its answer."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from oncelm.engine.outputs import CompletionOutput, RequestOutput
from oncelm.engine.params import SamplingParams
from oncelm.engine.places import Memo

if TYPE_CHECKING:
    from oncelm.engine.drafts import PromptLookup
    from oncelm.engine.prefix.tree import Chain, Snapshot
    from oncelm.engine.structured import Grammar
    from oncelm.engine.text import TextState


class State(Enum):
    """Where a request is.

    WAITING: it has no place among those that run. READING: its tokens but the last are being read, or will be as soon
    as there is memory. WRITING: they are read, and each step adds to its answer. FINISHED: for whatever reason.
    """

    WAITING = "waiting"
    READING = "reading"
    WRITING = "writing"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One answer to a prompt; the `n` answers to one prompt share their `output`.

    At position n it has the shared keys and values of its first n tokens in `pages`, and the self-decoder's states
    after exactly these in `slot`.

    Attributes:
        output: of all answers to the prompt; `answer` is this one's place in it.
        tokens: of the prompt and, behind them, of the answer; 4 bytes each, and cut and compared in no time.
        max_tokens: of the answer; 0: none is wanted, the prompt is read to its end to be kept.
        seed: of its random draws.
        text: what turns the tokens of the answer into text; `num_told` of them it has been told.
        grammar: what they have to follow.
        arrival: a number that grows from request to request.
        salt: only requests of the same salt share what was read.
        forks: further answers to the same prompt, which begin with a copy of this one's memory once that is read.
        slot: 0 while it has no memory.
        n: how many tokens its memory holds.
        num_unread: how many of its rows were planned whose tokens are not among `tokens` yet.
        cuts: positions at which a snapshot is due, beside the regular ones.
        chain: digests of its tokens, for the prefix cache.
        resumed: the snapshot that it came from or left last; its memory up to there is the same.
        snapshots: all that it came from or left.
        leader: the request that is reading the same text just now, as far as the position beside it: this one waits for
            the snapshot there.
        was_looked_up: in the cache, and among those that read; `num_known` of its tokens need not be read, as it seems.
        drafter: what proposes them.
        memo: what the sampler keeps between them.
    """

    output: RequestOutput
    answer: CompletionOutput
    params: SamplingParams
    tokens: array[int]
    num_prompt_tokens: int
    max_tokens: int
    seed: int
    text: TextState
    grammar: Grammar | None = None
    priority: int = 0
    arrival: int = 0
    salt: str | None = None
    forks: list[Request] = field(default_factory=list)

    state: State = State.WAITING
    slot: int = 0
    pages: list[int] = field(default_factory=list)
    n: int = 0
    num_unread: int = 0
    cuts: set[int] = field(default_factory=set)
    chain: Chain | None = None
    resumed: Snapshot | None = None
    snapshots: list[Snapshot] = field(default_factory=list)
    leader: tuple[Request, int] | None = None
    was_looked_up: bool = False
    num_known: int = 0

    num_told: int = 0
    drafter: PromptLookup | None = None
    memo: Memo = field(default_factory=Memo)

    def __post_init__(self) -> None:
        self.key = (self.priority, self.arrival, self.answer.index)
        self.most_tokens = self.num_prompt_tokens + self.max_tokens

    def __lt__(self, other: Request) -> bool:
        """Whether this one comes first: by priority (smaller ones first), then by arrival."""
        return self.key < other.key

    @property
    def request_id(self) -> str:
        return self.output.request_id

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def writes_on(self) -> bool:
        """Whether it has a row in the next step: its prompt is read, and no token on its way must be the last."""
        return self.state is State.WRITING and len(self.tokens) + self.num_unread < self.most_tokens

    @property
    def end(self) -> int:
        """Position up to which pieces are read: a row reads the last token, if there is an answer."""
        return len(self.tokens) - (self.max_tokens > 0)

    @property
    def num_to_read(self) -> int:
        """Tokens that pieces have still to read."""
        return self.end - self.n

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed, for which all of it has to be read."""
        if self.params.prompt_logprobs is None or self.answer.index:
            return False
        return len(self.output.prompt_logprobs or ()) < self.num_prompt_tokens
