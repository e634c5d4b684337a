"""The scheduler alone, without a model: who is read, who writes, who gets memory and who loses it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.engine.memory import Memory
from oncelm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from oncelm.engine.pages import Pages, Slots
from oncelm.engine.params import SamplingParams
from oncelm.engine.request import Request, State
from oncelm.engine.scheduler import Scheduler, Step, common_prefix
from oncelm.engine.work import UNREAD, Row

PAGE = 4


class Machine:
    """A scheduler, and what stands for the engine: every row writes the token 1.

    late: that is known once the next step is planned.
    """

    def __init__(self, num_pages=1000, num_seqs=4, budget=16, beside=None, cache=None, late=False, **options) -> None:
        self.pages, self.slots = Pages(num_pages), Slots(num_seqs + 1)
        self.scheduler = Scheduler(
            Memory(self.pages, self.slots, PAGE, cache),
            max_num_seqs=num_seqs,
            max_num_batched_tokens=budget,
            max_prefill_tokens_beside_decodes=beside or budget,
            read_tokens=self.read_tokens,
            **options,
        )
        self.late = late
        self.launched: list[tuple[Request, Row]] = []
        self.count = 0
        self.finished: list[Request] = []
        self.read: dict[Request, int] = {}  # tokens that were read of it since it last had no memory

    def add(self, length: int, max_tokens: int = 3, n: int = 1, priority: int = 0) -> Request:
        answers = [CompletionOutput(index) for index in range(n)]
        output = RequestOutput(str(self.count), None, [0] * length, answers, False, RequestMetrics(0.0))
        params = SamplingParams(n=n, max_tokens=max_tokens)
        first, *forks = (
            Request(output, answer, params, [0] * length, length, max_tokens, 0, None, None, priority, self.count)
            for answer in answers
        )
        first.forks = forks
        self.count += 1
        self.scheduler.add(first)
        return first

    def step(self) -> Step:
        """Check that what is planned can be done, and do it."""
        step = self.scheduler.schedule()
        readers = dict(step.pieces)
        assert len(readers) == len(step.pieces), "two pieces of one request"
        for request, piece in step.pieces:
            assert piece.tokens, "an empty piece"
            assert piece.start == self.read.get(request, 0), "a gap"
            assert piece.tokens == request.tokens[piece.start : piece.start + len(piece.tokens)]
            assert len(piece.pages) * PAGE >= piece.start + len(piece.tokens)
            self.read[request] = piece.start + len(piece.tokens)
        for request, fork in step.forks:
            self.read[fork] = self.read.get(request, 0)
            assert self.read[fork] == len(fork.tokens) - 1
            shared = self.read[fork] // PAGE
            assert request.pages[:shared] == fork.pages[:shared]
            assert not set(request.pages[shared:]) & set(fork.pages)
        rows = [request for request, _ in step.rows]
        assert len(set(rows)) == len(rows)
        for request, row in step.rows:
            assert row.start == self.read.get(request, 0)
            known = request.tokens[row.start :]
            assert row.tokens[: row.kept] == (known or [UNREAD])
            assert bool(known) == (request.num_unread == 1)
            assert request.num_output_tokens + request.num_unread <= request.max_tokens
            assert len(row.pages) * PAGE >= row.start + len(row.tokens)
            self.read[request] = row.start + row.kept
        held = [one for one in self.scheduler.running if one.slot]
        assert len({one.slot for one in held}) == len(held)
        self.pages.check()
        self.slots.check()
        earlier, self.launched = self.launched, step.rows
        self.write(earlier)
        if not self.late:
            self.read_tokens()
        self.read = {request: count for request, count in self.read.items() if request.slot}
        return step

    def read_tokens(self) -> None:
        launched, self.launched = self.launched, []
        self.write(launched)

    def write(self, rows: list[tuple[Request, Row]]) -> None:
        for request, row in rows:
            if request.state is State.FINISHED:
                continue
            assert request.state is State.WRITING, "memory was taken before a token was read"
            request.num_unread -= 1
            request.tokens.append(1)
            assert row.kept == 1
            if request.num_output_tokens == request.max_tokens:
                self.scheduler.finish(request)
                self.finished.append(request)

    def run(self, most: int = 10_000) -> int:
        """To the end: how many steps that takes."""
        for count in range(most):
            if not self.scheduler.has_unfinished:
                assert self.pages.num_used == self.slots.num_used == 0, "memory is lost"
                return count
            self.step()
        raise AssertionError("it does not end")


def read_by(step: Step) -> dict[Request, int]:
    return {request: len(piece.tokens) for request, piece in step.pieces}


def test_a_prompt_is_read_up_to_its_last_token_and_writes_in_the_same_step() -> None:
    machine = Machine(budget=16)
    request = machine.add(17, max_tokens=2)
    step = machine.step()
    assert read_by(step) == {request: 16}
    assert [row.start for _, row in step.rows] == [16]
    step = machine.step()
    assert not step.pieces
    assert [row.start for _, row in step.rows] == [17]
    assert not machine.scheduler.has_unfinished


def test_a_prompt_of_one_token_is_a_row() -> None:
    machine = Machine()
    machine.add(1, max_tokens=1)
    step = machine.step()
    assert not step.pieces
    assert [row.start for _, row in step.rows] == [0]


def test_halves_of_the_budget() -> None:
    """Half for the oldest, half for the shortest, each what the other does not need."""
    machine = Machine(budget=16)
    oldest, middle, short = machine.add(101), machine.add(51), machine.add(6)
    assert read_by(machine.step()) == {oldest: 8, short: 5, middle: 3}
    assert read_by(machine.step()) == {oldest: 8, middle: 7}  # the row of the short one counts
    machine = Machine(budget=16)
    first, second = machine.add(4), machine.add(101)
    assert read_by(machine.step()) == {first: 3, second: 13}


@pytest.mark.parametrize("length", [2, 5, 9])
def test_a_short_prompt_behind_a_giant_one_waits_less_than_two_pieces(length) -> None:
    machine = Machine(budget=16, num_pages=10_000)
    machine.add(20_000)
    for _ in range(3):
        machine.step()
    short = machine.add(length)
    step = machine.step()  # the piece after the one in which it came
    assert short in [request for request, _ in step.rows]


def test_a_giant_prompt_never_stops() -> None:
    machine = Machine(budget=16, beside=8, num_pages=10_000)
    giant = machine.add(400)
    for _ in range(100):
        if giant.state is not State.READING and giant.state is not State.WAITING:
            break
        machine.add(9, max_tokens=1)
        assert read_by(machine.step())[giant] >= min(3, 399 - giant.n)  # half of what rows leave
    assert giant.state is State.WRITING


def test_fewer_tokens_are_read_while_others_write() -> None:
    machine = Machine(budget=16, beside=4)
    machine.add(3, max_tokens=50)
    machine.step()
    reader = machine.add(100)
    assert read_by(machine.step()) == {reader: 4}


def test_the_latest_loses_its_memory_first() -> None:
    machine = Machine(num_pages=1 + 5, num_seqs=2)
    first, second = machine.add(7, max_tokens=9), machine.add(7, max_tokens=9)
    lost = 0
    while first.state is not State.FINISHED:
        step = machine.step()
        lost += step.num_preempted
        assert first.output.metrics.num_preemptions == 0
    assert lost == second.output.metrics.num_preemptions == 1
    assert machine.run()
    assert machine.finished == [first, second]
    assert second.num_output_tokens == 9


def test_the_less_important_loses_its_memory_first() -> None:
    machine = Machine(num_pages=1 + 5, num_seqs=2)
    early, important = machine.add(7, max_tokens=9, priority=1), machine.add(7, max_tokens=9, priority=0)
    machine.run()
    assert machine.finished == [important, early]
    assert early.output.metrics.num_preemptions == 1


def test_priorities_come_first_in_the_queue() -> None:
    machine = Machine(num_seqs=1)
    requests = [machine.add(3, priority=priority) for priority in (2, 0, 1, 0)]
    machine.run()
    assert machine.finished == [requests[1], requests[3], requests[2], requests[0]]


def test_one_without_memory_gives_its_place_up() -> None:
    machine = Machine(num_pages=1 + 4, num_seqs=2)
    running = machine.add(13, max_tokens=3, priority=1)
    waiting = machine.add(13, max_tokens=3, priority=1)
    machine.step()
    assert not waiting.slot
    important = machine.add(2, max_tokens=1)
    machine.step()
    assert machine.finished == [important]
    assert running.state is waiting.state is State.WAITING or running.output.metrics.num_preemptions == 1
    machine.run()
    assert machine.finished == [important, running, waiting]


def test_nobody_overtakes_one_that_is_too_large_just_now() -> None:
    machine = Machine(num_pages=1 + 8, num_seqs=3, budget=64)
    first = machine.add(16, max_tokens=4)
    machine.step()
    large = machine.add(28, max_tokens=2)
    small = machine.add(5, max_tokens=2)
    machine.step()
    assert first.state is State.WRITING
    assert not large.slot
    assert not small.slot
    machine.run()
    assert machine.finished == [first, large, small] or machine.finished == [first, small, large]


def test_a_prompt_leaves_a_page_to_each_that_writes() -> None:
    """Else it would lose its memory, and what was read of it, as soon as one of them grows."""
    machine = Machine(num_pages=1 + 8, num_seqs=3, budget=8)
    first, second = machine.add(7, max_tokens=6), machine.add(7, max_tokens=6)
    machine.step()
    third = machine.add(15, max_tokens=1)
    machine.run()
    assert machine.finished == [first, second, third]
    assert all(request.output.metrics.num_preemptions == 0 for request in machine.finished)


def test_answers_to_one_prompt_read_it_once() -> None:
    machine = Machine(num_seqs=4)
    request = machine.add(11, max_tokens=4, n=3)
    other = machine.add(3)
    step = machine.step()
    assert read_by(step) == {request: 10, other: 2}
    assert len(step.forks) == 2
    assert len(step.rows) == 4
    machine.run()
    assert len(machine.finished) == 4


def test_forks_need_places() -> None:
    machine = Machine(num_seqs=3)
    machine.add(3, max_tokens=5)
    request = machine.add(3, n=3)
    machine.step()
    assert request.state is State.WAITING
    machine.run()
    assert len(machine.finished) == 4


def test_a_fork_without_memory_reads_the_prompt_by_itself() -> None:
    machine = Machine(num_pages=1 + 3, num_seqs=2)
    machine.add(11, max_tokens=1, n=2)
    step = machine.step()
    assert not step.forks
    machine.run()
    assert len(machine.finished) == 2


def test_ten_thousand_wait() -> None:
    """A step looks at those that run, and at the first of those that wait."""
    machine = Machine(num_seqs=2)
    requests = [machine.add(3, max_tokens=2) for _ in range(10_000)]
    machine.step()
    for request in requests[5:9_990]:
        machine.scheduler.finish(request)
    assert len(machine.scheduler._waiting) < 200  # those that are not wanted any more do not pile up
    assert machine.scheduler.num_waiting == 13
    machine.run(100)
    assert machine.finished == [*requests[:5], *requests[9_990:]]


def test_finishing_in_any_state() -> None:
    machine = Machine(num_seqs=2, budget=4)
    reading, writing, waiting = machine.add(20, n=2), machine.add(2), machine.add(2)
    machine.scheduler.finish(writing)
    machine.step()
    assert reading.state is State.READING
    assert waiting.state is State.WAITING  # its place is the fork's
    machine.scheduler.finish(reading)
    machine.scheduler.finish(reading)
    machine.step()
    assert waiting.state is State.WRITING
    machine.scheduler.finish(waiting)
    assert not machine.scheduler.has_unfinished
    assert machine.pages.num_used == machine.slots.num_used == 0


def test_drafts_only_where_there_is_room() -> None:
    machine = Machine(num_pages=1 + 3, num_seqs=1, propose=lambda request: [5, 6, 7])
    request = machine.add(7, max_tokens=6)
    machine.scheduler.max_prefill_tokens_beside_decodes = 0
    row = machine.step().rows[0][1]
    assert (row.start, row.tokens, row.kept) == (6, [0, 5, 6, 7], 1)
    assert row.num_logits == 4
    for _ in range(2):
        row = machine.step().rows[0][1]
        assert row.tokens == [1, 5, 6, 7]
    request.tokens.append(1)  # as if a draft had been accepted: there are two tokens to feed, and no page for drafts
    request.tokens.append(1)
    step = machine.scheduler.schedule()
    row = step.rows[0][1]
    assert (row.start, row.tokens, row.kept) == (9, [1, 1, 1], 3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_requests_end_and_nothing_leaks(data) -> None:
    """Memory for one of the largest at least, whatever comes: all end with all their tokens, in bounded time."""
    num_seqs = data.draw(st.integers(1, 5), "num_seqs")
    machine = Machine(
        num_pages=1 + data.draw(st.integers(8, 20), "pages"),
        num_seqs=num_seqs,
        budget=data.draw(st.integers(num_seqs, 20), "budget"),
        beside=data.draw(st.integers(1, 20), "beside"),
        **data.draw(
            st.sampled_from([{}, {"late": True}, {"propose": lambda request: [9] * (len(request.tokens) % 4)}]),
            "options",
        ),
    )
    requests = []
    for _ in range(data.draw(st.integers(1, 12), "requests")):
        request = machine.add(
            data.draw(st.integers(1, 24)),
            data.draw(st.integers(1, 8)),
            n=data.draw(st.integers(1, num_seqs)),
            priority=data.draw(st.integers(0, 1)),
        )
        requests += [request, *request.forks]
        for _ in range(data.draw(st.integers(0, 3))):
            machine.step()
            if data.draw(st.integers(0, 7)) == 0:
                unfinished = [one for one in requests if one.state in (State.READING, State.WRITING)]
                if unfinished:
                    lost = data.draw(st.sampled_from(unfinished))
                    machine.scheduler.put_back(lost)
                    machine.launched = [(request, row) for request, row in machine.launched if request is not lost]
                    machine.read = {one: count for one, count in machine.read.items() if one.slot}
    machine.run(2000)
    assert set(machine.finished) == set(requests)
    assert all(request.num_output_tokens == request.max_tokens for request in requests)


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([1, 2, 9, 4], [1, 2, 3, 4]) == 2
