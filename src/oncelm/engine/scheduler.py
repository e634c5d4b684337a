"""What the next step does: which pieces of prompts are read, which requests write on, who gets memory and who loses it.

Plain Python on lists of numbers. A step costs a few microseconds for each request that runs, and the logarithm of the
number that waits.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from oncelm.engine.pages import Pages, Slots
from oncelm.engine.request import Request, State
from oncelm.engine.work import Piece, Row

if TYPE_CHECKING:
    from oncelm.engine.prefix import Match, PrefixCache


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
        cache: of prefixes; None: nothing is kept.
        max_num_batched_tokens: in the pieces of a step, less its rows.
        max_prefill_tokens_beside_decodes: in the pieces of a step that has rows.
        snapshot_interval: tokens from one snapshot of a long prompt to the next.
        propose: drafts of what may follow a request's tokens.
        keep: called with a request that loses its memory, and its position; None where that memory would go at once.
    """

    def __init__(
        self,
        pages: Pages,
        slots: Slots,
        cache: PrefixCache | None = None,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_tokens_beside_decodes: int,
        snapshot_interval: int = 8192,
        propose: Callable[[Request], list[int]] | None = None,
        keep: Callable[[Request, int], object] | None = None,
    ) -> None:
        self.pages, self.slots, self.cache = pages, slots, cache
        self.page_size, self.max_num_seqs = page_size, max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_tokens_beside_decodes = max_prefill_tokens_beside_decodes
        self.snapshot_interval, self.propose, self.keep = snapshot_interval, propose, keep
        self.running: list[Request] = []  # sorted
        self._waiting: list[Request] = []  # a heap; finished ones stay in it until they come up
        self._num_waiting = 0
        self._places = 0  # taken by those that run, and by the forks that they will have
        self._refused: tuple[Request, int] | None = None  # there was no memory for it, after so many had left
        self._num_left = 0

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
        self._drop(request)
        request.leader, request.was_compared = None, False

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
        for request in list(self.running):
            if request.state is State.WRITING:
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
        if self.keep is not None and request.n:
            self.keep(request, request.n)
        self.put_back(request)
        request.output.metrics.num_preemptions += 1
        step.num_preempted += 1

    def _plan_row(self, request: Request, step: Step) -> None:
        """Let a request write on, at the expense of later ones if there is no page for it."""
        drafts = self.propose(request) if self.propose is not None else []
        if not self._reserve(request, len(request.tokens) + len(drafts)):
            drafts = []
        while not self._reserve(request, len(request.tokens)):
            victim = self._last_with_memory()
            assert victim is not None
            self._preempt(victim, step)
            if victim is request:
                return
        tokens = [*request.tokens[request.n :]]
        step.rows.append((request, Row(request.slot, request.pages, request.n, tokens + drafts, len(tokens))))
        request.n = len(request.tokens)

    def _plan_pieces(self, step: Step, budget: int) -> None:
        """Half of the budget for the oldest prompt, half for those that need the least; each the rest of the other."""
        readers = [request for request in self.running if request.state is State.READING]
        oldest, blocked = None, False  # blocked: there is no memory for one whose turn it is, so no later one gets any
        shares: dict[Request, int] = {}
        for request in readers:
            if self._waits_for_leader(request):
                continue
            if request.slot or (not blocked and self._place(request)):
                oldest = request
                break
            blocked = True
        if oldest is None:
            return
        shares[oldest] = min(self._until_stop(oldest), (budget + 1) // 2)
        budget -= shares[oldest]
        readers.remove(oldest)
        readers.sort(key=lambda one: (one.priority, one.num_to_read, one.key))
        for request in readers:
            if not request.slot:
                if blocked or not budget or self._waits_for_leader(request):
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
            if self.cache is not None and count == self._until_stop(request):
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
            if self._fork(request, fork):
                step.forks.append((request, fork))
            else:
                self.add(fork)  # to read the prompt by itself
        for one in (request, *(fork for fork in forks if fork.slot)):
            self._plan_row(one, step)

    def _until_stop(self, request: Request) -> int:
        """Tokens of a request that may be read in one piece."""
        end = request.end
        if self.cache is not None:
            end = min(end, (request.n // self.snapshot_interval + 1) * self.snapshot_interval, *request.cuts)
        return end - request.n

    # -- memory ---------------------------------------------------------------------------------------------------

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _free(self, num_pages: int, num_slots: int = 0, keep: Match | None = None) -> bool:
        """Whether so many pages and slots are free, or were taken from snapshots."""
        if self.pages.num_free >= num_pages and self.slots.num_free >= num_slots:
            return True
        return self.cache is not None and self.cache.free(num_pages, num_slots, keep)

    def _allocate(self, count: int) -> list[int] | None:
        return self.pages.allocate(count) if self._free(count) else None

    def _reserve(self, request: Request, num_tokens: int) -> bool:
        """Make room for so many tokens of a request, if there are pages."""
        if num_tokens <= len(request.pages) * self.page_size:
            return True
        pages = self._allocate(self._num_pages(num_tokens) - len(request.pages))
        if pages is None:
            return False
        request.pages += pages
        return True

    def _match(self, request: Request) -> Match | None:
        """What the cache has of a request's tokens; None where that is nothing, or must not be used."""
        if self.cache is None or request.wants_prompt_logprobs:
            return None
        if request.chain is None:
            request.chain = self.cache.chain(request.salt)
        tokens = request.tokens if request.max_tokens else [*request.tokens, 0]  # a match leaves one token to be read
        match = self.cache.match(tokens, request.salt, chain=request.chain)
        if match.shared >= match.n + self.page_size:  # what others read too: the next one shall find a snapshot there
            request.cuts.add(min(match.shared, request.end))
        return match if match.n else None

    def _place(self, request: Request) -> bool:
        """Give a request a slot and the pages of all its tokens, with what the cache has of them; or nothing."""
        if self._refused == (request, self._num_left):
            return False
        count, match = self._num_pages(len(request.tokens)), self._match(request)
        count += sum(1 for one in self.running if one.slot)  # those that write will soon need a page more
        if match is not None and not self._free(count - match.held_pages, 1, match):
            match = None  # its own snapshot takes the memory that it needs
        if match is None and not self._free(count, 1):
            self._refused = (request, self._num_left)
            return False
        slot = self.slots.allocate()
        assert slot is not None
        request.slot = slot
        while match is not None and self.cache is not None:
            pages = self.cache.restore(match, slot, self._allocate)
            if pages is not None:
                request.pages, request.n, request.resumed = pages, match.n, match.snapshot
                if match.snapshot is not None:
                    request.snapshots.append(match.snapshot)
                break
            shorter = self._match(request)  # of a snapshot that was damaged, one before may still be whole
            match = shorter if shorter is not None and shorter.n < match.n else None
        if not self._reserve(request, len(request.tokens)):  # a snapshot that could not be restored after all
            self._drop(request)
            return False
        request.cuts = {cut for cut in request.cuts if cut > request.n}
        if request.output.metrics.first_scheduled_time is None:
            request.output.num_cached_tokens = request.n
        return True

    def _drop(self, request: Request) -> None:
        """Take a request's memory."""
        if request.slot:
            self.slots.release(request.slot)
            self.pages.release(request.pages)
            self._num_left += 1
        request.slot, request.pages, request.n, request.resumed = 0, [], 0, None

    def _fork(self, request: Request, fork: Request) -> bool:
        """A slot and pages for another answer to the same prompt: full pages are shared, the last one is its own."""
        full = request.n // self.page_size
        count = self._num_pages(len(fork.tokens)) - full
        if not self._free(count, 1):
            return False
        slot, pages = self.slots.allocate(), self.pages.allocate(count)
        assert slot is not None
        assert pages is not None
        self.pages.share(request.pages[:full])
        self._enter(fork)
        fork.slot, fork.pages = slot, request.pages[:full] + pages
        fork.n, fork.resumed, fork.state = request.n, request.resumed, State.WRITING
        return True

    def _waits_for_leader(self, request: Request) -> bool:
        """Whether another request is just reading what this one begins with: it is read once, to a snapshot there."""
        if self.cache is None or request.slot or request.wants_prompt_logprobs:
            return False
        if not request.was_compared:
            request.was_compared = True
            request.leader = self._find_leader(request)
        if request.leader is None:
            return False
        leader, common = request.leader
        return leader.state is State.READING and leader.n < common

    def _find_leader(self, request: Request) -> tuple[Request, int] | None:
        """The earlier one that has most in common with a request, if that is a page at least, and where it ends."""
        best: tuple[Request, int] | None = None
        least = self.page_size
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
        match = self._match(request)
        if match is not None and match.n + self.page_size > best[1]:
            return None
        best[0].cuts.add(best[1])
        return best


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
