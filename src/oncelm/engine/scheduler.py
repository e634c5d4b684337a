"""What the next step does: which pieces of prompts are read, which requests write on, who gets memory and who loses it.

Plain Python on lists of numbers. A step costs a few microseconds for each request that runs, and the logarithm of the
number that waits.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from oncelm.engine.memory import Memory
from oncelm.engine.request import Request, State
from oncelm.engine.work import UNREAD, Piece, Row


@dataclass
class Step:
    """What is to be done, in this order.

    Attributes:
        pieces: tokens of prompts to read.
        snapshots: requests whose memory is worth keeping behind the pieces, each with its position then.
        forks: requests whose prompt is read, each with one that goes on from a copy of their memory.
        kept: requests that are read to be kept, and are now.
        rows: requests that write on.
    """

    pieces: list[tuple[Request, Piece]] = field(default_factory=list)
    snapshots: list[tuple[Request, int]] = field(default_factory=list)
    forks: list[tuple[Request, Request]] = field(default_factory=list)
    kept: list[Request] = field(default_factory=list)
    rows: list[tuple[Request, Row]] = field(default_factory=list)
    num_preempted: int = 0


class Scheduler:
    """Requests by priority, then arrival: those that wait, and at most `max_num_seqs` that run.

    Args:
        memory: of those that run.
        max_num_batched_tokens: in the pieces of a step, less its rows.
        max_prefill_tokens_beside_decodes: in the pieces of a step that has rows.
        snapshot_interval: tokens from one snapshot of a long prompt to the next.
        propose: drafts of what may follow a request's tokens.
        read_tokens: takes in all tokens that were chosen and are not read yet, which may end requests. Rows are planned
            without them; they have to be known only before a request loses its memory.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_tokens_beside_decodes: int,
        snapshot_interval: int = 8192,
        propose: Callable[[Request], list[int]] | None = None,
        read_tokens: Callable[[], object] = lambda: None,
    ) -> None:
        self.memory, self.max_num_seqs = memory, max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_tokens_beside_decodes = max_prefill_tokens_beside_decodes
        self.snapshot_interval, self.propose, self.read_tokens = snapshot_interval, propose, read_tokens
        self.running: list[Request] = []  # sorted
        self._waiting: list[Request] = []  # a heap; finished ones stay in it until they come up
        self._num_waiting = 0
        self._places = 0  # taken by those that run, and by the forks that they will have
        self._refused: tuple[Request, int] | None = None  # there was no memory for it, when so many had lost theirs

    # -- coming and going -----------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self._num_waiting)

    def add(self, request: Request) -> None:
        """Queue a request. It must fit in all pages, and its forks into `max_num_seqs` beside it."""
        assert len(request.forks) < self.max_num_seqs
        request.state = State.WAITING
        self._num_waiting += 1
        heapq.heappush(self._waiting, request)

    def finish(self, request: Request) -> None:
        """Take out a request that has ended, or is not wanted any more."""
        if request.state is State.WAITING:
            self._num_waiting -= 1
            if len(self._waiting) > 2 * self._num_waiting + 64:
                self._waiting = [one for one in self._waiting if one is not request and one.state is State.WAITING]
                heapq.heapify(self._waiting)
        elif request.state is not State.FINISHED:
            self._leave(request)
        request.state = State.FINISHED

    def put_back(self, request: Request) -> None:
        """A running request loses its memory; it waits in front of those that came later, to be read again."""
        self._leave(request)
        self.add(request)

    def _leave(self, request: Request) -> None:
        """A request is none of those that run any more."""
        del self.running[bisect_left(self.running, request)]
        self._places -= 1 + len(request.forks)
        self.memory.drop(request)
        request.leader, request.was_looked_up, request.num_unread = None, False, 0

    def _enter(self, request: Request) -> None:
        insort(self.running, request)
        self._places += 1 + len(request.forks)
        request.state = State.READING

    # -- planning -------------------------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """What to do next; positions and memory of the requests are already those behind it."""
        step = Step()
        self._fill_places()
        self._make_way(step)
        writers = [request for request in self.running if request.writes_on]
        for request in writers:
            if request.state is State.WRITING:
                self._make_room(request, step)
        for request in writers:
            if request.state is State.WRITING:  # it was not an earlier one that got its memory
                self._plan_row(request, step)
        budget = self.max_num_batched_tokens - sum(len(row.tokens) for _, row in step.rows)
        if step.rows:
            budget = min(budget, self.max_prefill_tokens_beside_decodes)
        self._plan_pieces(step, max(0, budget))
        return step

    def _fill_places(self) -> None:
        """Requests that wait begin to run while there are places; one that has no memory yet gives its place up."""
        while self._waiting:
            first = self._waiting[0]
            if first.state is not State.WAITING:
                heapq.heappop(self._waiting)
                continue
            if self._places + 1 + len(first.forks) > self.max_num_seqs:
                last = next((one for one in reversed(self.running) if not one.slot and first < one), None)
                if last is None:
                    return
                self.put_back(last)
                continue
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            self._enter(first)

    def _make_way(self, step: Step) -> None:
        """The first that has no memory yet gets that of less important ones, if it has to."""
        first = next((one for one in self.running if not one.slot and not self._waits_for_leader(one)), None)
        while first is not None and not self._place(first):
            victim = self._last_with_memory()
            if victim is None or victim.priority <= first.priority:
                return
            self._preempt(victim, step)

    def _last_with_memory(self) -> Request | None:
        return next((one for one in reversed(self.running) if one.slot), None)

    def _preempt(self, request: Request, step: Step) -> None:
        """Take a request's memory; or read tokens first that are not read, which may give memory, or end this one."""
        if request.num_unread:
            self.read_tokens()
            return
        if self.memory.keeps_below and request.n:
            self.memory.snapshot(request, request.n)
        self.put_back(request)
        request.output.metrics.num_preemptions += 1
        step.num_preempted += 1

    def _make_room(self, request: Request, step: Step) -> None:
        """A page for the token that a request writes next, at the expense of later requests if there is none."""
        while not self.memory.reserve(request, len(request.tokens) + request.num_unread):
            victim = self._last_with_memory()
            assert victim is not None
            self._preempt(victim, step)
            if request.state is not State.WRITING:  # it was the last itself, or has ended
                return

    def _plan_row(self, request: Request, step: Step) -> None:
        """Let a request, which has room, write on."""
        start, known = request.n, len(request.tokens)
        if request.num_unread:
            row = Row(request.slot, request.pages, start, [UNREAD])
        else:
            tokens = [*request.tokens[start:]]
            drafts = self.propose(request) if self.propose is not None else []
            if drafts and not self.memory.reserve(request, known + len(drafts)):
                drafts = []
            row = Row(request.slot, request.pages, start, tokens + drafts, known - start)
        step.rows.append((request, row))
        request.n = known + request.num_unread
        request.num_unread += 1

    def _plan_pieces(self, step: Step, budget: int) -> None:
        """Half of the budget for the oldest prompt, half for those that need the least; each the rest of the other."""
        readers = [request for request in self.running if request.state is State.READING]
        oldest, blocked = None, False  # blocked: there is no memory for one whose turn it is, so no later one gets any
        shares: dict[Request, int] = {}
        waits = {request for request in readers if self._waits_for_leader(request)}  # before any leader reads on
        for request in readers:
            if request in waits:
                continue
            if request.slot or (not blocked and self._place(request)):
                oldest = request
                break
            blocked = True
        if oldest is None:
            # whoever has the memory will give it back; if nobody has it, all would wait for ever
            assert not readers or self._last_with_memory() is not None, "a request does not fit into all memory"
            return
        shares[oldest] = min(self._until_stop(oldest), (budget + 1) // 2)
        budget -= shares[oldest]
        readers.remove(oldest)
        readers.sort(key=lambda one: (one.priority, one.num_to_read - (0 if one.slot else one.num_known), one.key))
        for request in readers:
            if not request.slot:
                if blocked or not budget or request in waits:
                    continue
                if not self._place(request):
                    blocked = True
                    continue
            shares[request] = min(self._until_stop(request), budget)
            budget -= shares[request]
        shares[oldest] += min(self._until_stop(oldest) - shares[oldest], budget)
        for request, share in sorted(shares.items(), key=lambda pair: pair[0].key):
            self._plan_piece(request, share, step)

    def _plan_piece(self, request: Request, count: int, step: Step) -> None:
        """Read so many tokens; one whose prompt is read then writes in the same step, and so do its forks."""
        start, end = request.n, request.n + count
        if count:
            tokens = request.tokens[start:end]
            piece = Piece(request.slot, request.pages, start, tokens, request.wants_prompt_logprobs)
            step.pieces.append((request, piece))
            if self.memory.cache is not None and count == self._until_stop(request):
                step.snapshots.append((request, end))
            request.cuts.discard(end)
            request.n = end
        if request.num_to_read:
            return
        if not request.max_tokens:
            step.kept.append(request)
            return
        request.state = State.WRITING
        forks, request.forks = request.forks, []
        self._places -= len(forks)
        for fork in forks:
            if self.memory.fork(request, fork):
                self._enter(fork)
                fork.state = State.WRITING
                step.forks.append((request, fork))
            else:
                self.add(fork)  # to read the prompt by itself
        for one in (request, *(fork for fork in forks if fork.slot)):
            self._plan_row(one, step)

    def _place(self, request: Request) -> bool:
        """Give a request memory. Those that write will soon need a page more each: as much has to be left."""
        lost = self.memory.num_dropped
        if self._refused == (request, lost):
            return False
        if not self.memory.place(request, spare_pages=sum(1 for one in self.running if one.slot)):
            self._refused = (request, lost)
            return False
        if request.output.metrics.first_scheduled_time is None:
            request.output.num_cached_tokens = request.n
        return True

    def _until_stop(self, request: Request) -> int:
        """Tokens of a request that may be read in one piece."""
        end = request.end
        if self.memory.cache is not None:
            end = min(end, (request.n // self.snapshot_interval + 1) * self.snapshot_interval, *request.cuts)
        return end - request.n

    # -- what begins alike ------------------------------------------------------------------------------------------

    def _waits_for_leader(self, request: Request) -> bool:
        """Whether another request is just reading what this one begins with: it is read once, to a snapshot there."""
        if self.memory.cache is None or request.slot or request.wants_prompt_logprobs:
            return False
        if not request.was_looked_up:
            match = self.memory.match(request)
            request.was_looked_up, request.num_known = True, match.n if match is not None else 0
            request.leader = self._find_leader(request)
            if request.leader is not None:
                request.num_known = request.leader[1]
        if request.leader is None:
            return False
        leader, common = request.leader
        return leader.state is State.READING and leader.n < common

    def _find_leader(self, request: Request) -> tuple[Request, int] | None:
        """The earlier one that has most in common with a request, if that is a page at least, and where it ends."""
        best: tuple[Request, int] | None = None
        least = self.memory.page_size
        for other in self.running:
            if other is request:
                break
            if other.state is not State.READING or other.salt != request.salt:
                continue
            if len(other.tokens) <= least or other.tokens[:least] != request.tokens[:least]:
                continue
            common = common_prefix(other.tokens[:-1], request.tokens[:-1])
            if common > other.n and common >= least:
                best, least = (other, common), common + 1
        if best is None:
            return None
        leader, common = best
        if request.num_known + self.memory.page_size > common:
            return None
        near = max((cut for cut in leader.cuts if leader.n < cut <= common), default=0)
        if near and common - near < self.memory.page_size:  # one snapshot for those that part within a page
            common = near
        leader.cuts.add(common)
        return leader, common


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements two lists, or arrays, begin with in common.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is faster than Python's own loop
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
