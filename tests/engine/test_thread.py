"""An engine in its own thread: every reader gets its outputs, or the reason why not; nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time

import pytest

from oncelm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from oncelm.engine.params import SamplingParams
from oncelm.engine.thread import EngineStopped, EngineThread, Mailbox


class CountingEngine:
    """Stand-in: each step gives every request a token, 0, 1, 2, ..., and a letter.

    `gate` is a semaphore that a step needs; None: steps come as fast as they can.
    """

    def __init__(self, gate: threading.Semaphore | None = None) -> None:
        self.running: dict[str, tuple[RequestOutput, int]] = {}
        self.gate, self.num_steps, self.fails, self.is_closed = gate, 0, None, False
        self.aborted: list[str] = []
        self.changed: list[RequestOutput] = []

    def add_request(self, request_id, prompt, params, **options):
        if not prompt:
            raise ValueError("the prompt is empty")
        answers = [CompletionOutput(i, logprobs=[]) for i in range(params.n)]
        output = RequestOutput(request_id, None, list(prompt), answers, False, RequestMetrics(0.0))
        self.running[request_id] = output, params.max_tokens
        return output

    def abort_request(self, request_id):
        output, _ = self.running.get(request_id, (None, 0))
        if output is not None:
            self.aborted.append(request_id)
            del self.running[request_id]
            self.changed.append(output)
            output.finished = True
            for answer in output.outputs:
                answer.finish_reason = "abort"

    def has_unfinished(self):
        return bool(self.running or self.changed)

    def close(self):
        self.is_closed = True

    def step(self):
        if self.gate is not None:
            assert self.gate.acquire(timeout=20)
        if self.fails is not None:
            raise self.fails
        self.num_steps += 1
        outputs = [*self.changed, *(output for output, _ in self.running.values())]
        self.changed = []
        for output, most in list(self.running.values()):
            for answer in output.outputs:
                answer.token_ids.append(len(answer.token_ids))
                answer.logprobs.append({})
                answer.text += "abcdefghij"[len(answer.text) % 10]
                if len(answer.token_ids) == most:
                    answer.finish_reason, output.finished = "length", True
            if output.finished:
                del self.running[output.request_id]
        return outputs


def begin(thread: EngineThread, name: str = "a", max_tokens: int = 5, prompt=(1, 2), **options) -> Mailbox:
    mailbox = Mailbox(name, options.pop("only_finished", False))
    params = SamplingParams(max_tokens=max_tokens, **options)
    thread.add(mailbox, lambda: thread._engine.add_request(name, list(prompt), params))
    return mailbox


async def read_all(mailbox: Mailbox) -> list[RequestOutput]:
    outputs = []
    while not outputs or not outputs[-1].finished:
        outputs.append((await mailbox.take()).read())
    return outputs


@contextlib.contextmanager
def engine_thread(engine: CountingEngine):
    """A thread that is stopped at the end, whatever happened."""
    thread = EngineThread(engine)
    try:
        yield thread
    finally:
        gate, engine.gate = engine.gate, None
        if gate is not None:
            gate.release()
        thread.stop()
        assert thread.ended.done()
        assert engine.is_closed
        assert not engine.running
        assert not thread._mailboxes


def run(main) -> None:
    """A coroutine to its end; 30 s are more than any of these needs."""
    asyncio.run(asyncio.wait_for(main, 30))


def test_an_answer_comes_as_it_is_written() -> None:
    async def main() -> None:
        gate = threading.Semaphore(0)
        with engine_thread(CountingEngine(gate)) as thread:
            mailbox = begin(thread, max_tokens=3, n=2)
            for count in range(1, 4):
                gate.release()
                output = (await mailbox.take()).read()
                for index, answer in enumerate(output.outputs):
                    assert answer.index == index
                    assert answer.token_ids == list(range(count))
                    assert answer.text == "abc"[:count]
                    assert answer.logprobs == [{}] * count
                assert output.finished == (count == 3)

    run(main())


def test_a_slow_reader_finds_the_newest_output_alone() -> None:
    async def main() -> None:
        gate = threading.Semaphore(0)
        engine = CountingEngine(gate)
        with engine_thread(engine) as thread:
            mailbox = begin(thread, max_tokens=1000)
            gate.release()
            first = await mailbox.take()
            gate.release(500)
            while engine.num_steps < 501:
                await asyncio.sleep(0)
            second = await mailbox.take()
            assert first.read().outputs[0].token_ids == [0]  # as it was then
            new = second.read(since=first)
            assert new.outputs[0].token_ids[0] == 1
            assert len(new.outputs[0].token_ids) >= 499
            assert len(new.outputs[0].text) == len(new.outputs[0].logprobs) == len(new.outputs[0].token_ids)
            gate.release(499)
            assert (await read_all(mailbox))[-1].outputs[0].token_ids == list(range(1000))

    run(main())


def test_the_last_output_alone_where_no_other_is_wanted() -> None:
    async def main() -> None:
        with engine_thread(CountingEngine()) as thread:
            mailbox = begin(thread, max_tokens=50, only_finished=True)
            (output,) = await read_all(mailbox)
            assert output.outputs[0].token_ids == list(range(50))

    run(main())


def test_thousands_at_once() -> None:
    async def main() -> None:
        with engine_thread(CountingEngine()) as thread:
            mailboxes = [begin(thread, f"{i}", max_tokens=1 + i % 7) for i in range(3000)]
            for i, outputs in enumerate(await asyncio.gather(*map(read_all, mailboxes))):
                assert outputs[-1].request_id == f"{i}"
                assert outputs[-1].outputs[0].token_ids == list(range(1 + i % 7))

    run(main())


def test_event_loops_of_several_threads() -> None:
    done = []
    with engine_thread(CountingEngine()) as thread:

        async def main(number: int) -> None:
            mailboxes = [begin(thread, f"{number}-{i}") for i in range(20)]
            done.extend(await asyncio.gather(*map(read_all, mailboxes)))

        threads = [threading.Thread(target=run, args=(main(number),)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert sorted(outputs[-1].request_id for outputs in done) == sorted(f"{n}-{i}" for n in range(4) for i in range(20))


def test_a_request_that_is_refused_is_nobody_elses_error() -> None:
    async def main() -> None:
        with engine_thread(CountingEngine()) as thread:
            refused, good = begin(thread, "bad", prompt=()), begin(thread, "good")
            with pytest.raises(ValueError, match="the prompt is empty"):
                await refused.take()
            assert (await read_all(good))[-1].outputs[0].finish_reason == "length"
            assert (await read_all(begin(thread, "bad")))[-1].finished  # its name is free again

    run(main())


def test_a_name_that_is_in_use() -> None:
    async def main() -> None:
        gate = threading.Semaphore(0)
        with engine_thread(CountingEngine(gate)) as thread:
            first = begin(thread, "a")
            with pytest.raises(ValueError, match=r"request_id 'a' .* choose another"):
                begin(thread, "a")
            gate.release(5)
            assert (await read_all(first))[-1].finished

    run(main())


@pytest.mark.parametrize("begun", [False, True])
def test_aborted_by_name(begun) -> None:
    async def main() -> None:
        gate = threading.Semaphore(0)
        engine = CountingEngine(gate)
        with engine_thread(engine) as thread:
            mailbox, other = begin(thread, "a", max_tokens=9), begin(thread, "b", max_tokens=9)
            if begun:
                gate.release()
                await mailbox.take()
                await other.take()
            thread.abort("a")
            thread.abort("nobody")
            gate.release(2)  # one step may be waiting for it already
            last = (await read_all(mailbox))[-1]
            assert last.outputs[0].finish_reason == "abort"
            assert engine.aborted == ["a"]
            gate.release(9)
            assert (await read_all(other))[-1].outputs[0].finish_reason == "length"
            thread.abort("a")  # it has ended

    run(main())


def test_given_up_and_its_name_taken_by_another() -> None:
    async def main() -> None:
        gate = threading.Semaphore(0)
        engine = CountingEngine(gate)
        with engine_thread(engine) as thread:
            first = begin(thread, "a", max_tokens=9)
            gate.release()
            await first.take()
            thread.give_up(first)
            second = begin(thread, "a", max_tokens=4)
            thread.give_up(first)
            gate.release(9)
            assert (await read_all(second))[-1].outputs[0].token_ids == [0, 1, 2, 3]
            assert engine.aborted == ["a"]

    run(main())


@pytest.mark.parametrize("was_told", [False, True])
def test_requests_of_a_closed_event_loop_are_aborted(was_told) -> None:
    gate = threading.Semaphore(0)
    engine = CountingEngine(gate)
    with engine_thread(engine) as thread:

        async def main() -> None:
            begin(thread, "a", max_tokens=10**6)
            if was_told:
                gate.release()
            while engine.num_steps < was_told:
                await asyncio.sleep(0)

        asyncio.run(main())
        gate.release(10)
        while not engine.aborted:
            time.sleep(0.001)
        assert engine.aborted == ["a"]


def test_a_failure_of_the_engine_reaches_all_who_wait() -> None:
    async def main() -> None:
        gate = threading.Semaphore(0)
        engine = CountingEngine(gate)
        thread = EngineThread(engine)
        mailboxes = [begin(thread, f"{i}") for i in range(50)]
        waiting = [asyncio.create_task(read_all(mailbox)) for mailbox in mailboxes]
        await asyncio.sleep(0)
        engine.fails = MemoryError("no more")
        gate.release()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, EngineStopped)
            assert str(error) == "the engine has stopped: MemoryError: no more"
            assert error.__cause__ is engine.fails
        with pytest.raises(EngineStopped, match="no more"):
            begin(thread, "late")
        with pytest.raises(EngineStopped, match="no more"):
            thread.call(lambda: 1)
        thread.abort("0")
        thread.stop()
        assert thread.ended.done()

    run(main())


def test_calls_between_steps() -> None:
    with engine_thread(CountingEngine()) as thread:
        assert thread.call(lambda: threading.current_thread().name).result(20) == "oncelm-engine"
        with pytest.raises(ZeroDivisionError):
            thread.call(lambda: 1 // 0).result(20)


def test_closing_lets_those_that_run_end() -> None:
    async def main() -> None:
        gate = threading.Semaphore(0)
        thread = EngineThread(CountingEngine(gate))
        mailbox = begin(thread, max_tokens=20)
        thread.close()
        with pytest.raises(EngineStopped, match="was closed"):
            begin(thread, "late")
        gate.release(20)
        await asyncio.wrap_future(thread.ended)
        assert (await read_all(mailbox))[-1].outputs[0].token_ids == list(range(20))  # read when all is over
        thread.close()

    run(main())


def test_what_was_asked_for_before_it_was_closed_is_done() -> None:
    async def main() -> None:
        thread = EngineThread(CountingEngine())
        mailbox = Mailbox("a")

        def both() -> None:  # between two looks at what was asked for
            thread.add(mailbox, lambda: thread._engine.add_request("a", [1], SamplingParams(max_tokens=3)))
            thread.close()

        thread.call(both)
        assert (await read_all(mailbox))[-1].outputs[0].token_ids == [0, 1, 2]
        await asyncio.wrap_future(thread.ended)

    run(main())


@pytest.mark.parametrize("waits_first", [False, True])
def test_closing_in_time_aborts_the_rest(waits_first) -> None:
    async def main() -> None:
        engine = CountingEngine()
        thread = EngineThread(engine)
        mailboxes = [begin(thread, f"{i}", max_tokens=10**9) for i in range(3)]
        if waits_first:
            thread.close()
        thread.close(timeout=0.01)
        for mailbox in mailboxes:
            assert (await read_all(mailbox))[-1].outputs[0].finish_reason == "abort"
        await asyncio.wrap_future(thread.ended)
        assert sorted(engine.aborted) == ["0", "1", "2"]

    run(main())


def test_a_forked_process_is_told_that_its_engine_is_not_there(monkeypatch) -> None:
    async def main() -> None:
        with engine_thread(CountingEngine()) as thread:
            monkeypatch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(EngineStopped, match="was forked"):
                begin(thread, "0", max_tokens=2)
            with pytest.raises(EngineStopped, match="was forked"):
                thread.call(int)

    run(main())


def test_nothing_stays_behind_of_what_was_read() -> None:
    def num_outputs() -> int:
        gc.collect()
        return sum(isinstance(found, RequestOutput) for found in gc.get_objects())

    async def main() -> None:
        with engine_thread(CountingEngine()) as thread:
            before = num_outputs()  # of other tests
            for i in range(200):
                await read_all(begin(thread, f"{i}", max_tokens=2))
            assert num_outputs() < before + 20

    run(main())
