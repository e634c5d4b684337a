"""An engine in a thread of its own: tasks of any event loops give it requests and read their outputs."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from oncelm.engine.outputs import CompletionOutput, RequestOutput

T = TypeVar("T")


class Steps(Protocol):
    """What a thread needs of an engine, which runs requests a step at a time."""

    def abort_request(self, request_id: str) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def has_unfinished(self) -> bool: ...

    def close(self) -> None: ...


class EngineStopped(RuntimeError):
    """The engine was closed, or has failed (`__cause__` says how): it takes no more requests."""


class Newest:
    """An output as it stands between two steps, while the engine goes on writing to it.

    It costs the same at any length: the lists are the engine's own, which only grow, and are cut when they are read.
    """

    def __init__(self, output: RequestOutput) -> None:
        self.finished = output.finished
        self._output = output
        self._answers = [
            (each, each.text, len(each.token_ids), each.cumulative_logprob, each.finish_reason)
            for each in output.outputs
        ]

    def read(self, since: Newest | None = None) -> RequestOutput:
        """A copy that nobody changes any more; with `since`, of what has come since then only."""
        answers = []
        for i, (answer, text, count, total, reason) in enumerate(self._answers):
            told_text, told = ("", 0) if since is None else since._answers[i][1:3]
            new = None if answer.logprobs is None else answer.logprobs[told:count]
            part = CompletionOutput(answer.index, text[len(told_text) :], answer.token_ids[told:count], total, new)
            if reason is not None:  # then nothing changes any more
                part.finish_reason, part.stop_reason, part.error = reason, answer.stop_reason, answer.error
            answers.append(part)
        of = self._output
        times = replace(of.metrics, token_times=of.metrics.token_times[: self._answers[0][2]])
        about_prompt = of.prompt_logprobs if since is None else None
        return RequestOutput(
            of.request_id, of.prompt, of.prompt_token_ids, answers, self.finished, times, about_prompt,
            of.num_cached_tokens,
        )  # fmt: skip


class Mailbox:
    """What a task has not read yet of its request: the newest output, or the error that came instead.

    The engine's thread puts, the task takes; however slow it is, one output is kept.

    Args:
        only_finished: the task wants the last output and no other.

    Attributes:
        output: the engine's own, which it writes to; None: it has not begun.
    """

    def __init__(self, request_id: str, only_finished: bool = False) -> None:
        self.request_id, self.only_finished = request_id, only_finished
        self.loop = asyncio.get_running_loop()
        self.output: RequestOutput | None = None
        self._newest: Newest | None = None
        self._taken: Newest | None = None
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self._was_told = False

    def put(self, content: Newest | Exception) -> bool:
        """Whether the task has to be woken, which it need not be while it has not looked at what was there before."""
        if isinstance(content, Exception):
            self._error = content
        else:
            self._newest = content
        was_told, self._was_told = self._was_told, True
        return not was_told

    def wake(self) -> None:
        """In the task's event loop: there is something to take."""
        self._wake.set()

    async def take(self) -> Newest:
        """The newest output, once there is one that was not taken before."""
        while True:
            self._was_told = False  # before it looks: what is put from here on wakes it again
            newest = self._newest
            if newest is not None and newest is not self._taken:
                self._taken = newest
                return newest
            if self._error is not None:
                raise self._error
            await self._wake.wait()
            self._wake.clear()


class EngineThread:
    """Runs an engine in a thread of its own, from now on until it is closed.

    Methods may be called from any thread, and do not wait for the step that is running.

    Args:
        engine: nobody else calls it from now on.

    Attributes:
        ended: done when the thread is about to end, whatever ended it.
    """

    def __init__(self, engine: Steps) -> None:
        self._engine = engine
        self._changed = threading.Condition()  # guards what follows
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._mailboxes: dict[str, Mailbox] = {}
        self._deadline: float | None = None  # when those that still run are aborted; None: it is open
        self._cause: BaseException | None = None
        self._process = os.getpid()
        self.ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="oncelm-engine", daemon=True)
        self._thread.start()

    def add(self, mailbox: Mailbox, begin: Callable[[], RequestOutput]) -> None:
        """Begin a request. Its outputs come into the mailbox; if the engine refuses it, the error does.

        Args:
            begin: called in the thread; it gives the engine the request, by the mailbox's id, and returns the output
                that the engine writes to.

        Raises:
            EngineStopped: it is closed, or has failed.
            ValueError: a request with this id is running.
        """
        self._check_process()
        request_id = mailbox.request_id

        def add() -> None:
            if self._mailboxes.get(request_id) is mailbox:  # else it was given up meanwhile
                try:
                    mailbox.output = begin()
                except Exception as error:  # it is this request's alone
                    self._refuse(mailbox, error)

        with self._changed:
            if request_id in self._mailboxes:
                raise ValueError(f"request_id {request_id!r} is that of a request that is running; choose another one.")
            self.call(add)
            self._mailboxes[request_id] = mailbox

    def abort(self, request_id: str) -> None:
        """End a request before the next step: its memory is given back, and its last output says "abort".

        Nothing happens where there is no such request any more.
        """
        with self._changed:
            if request_id in self._mailboxes:
                self._add_call(lambda: self._engine.abort_request(request_id))

    def give_up(self, mailbox: Mailbox) -> None:
        """Abort the request of a mailbox that nobody takes from any more. Its id is free at once."""
        with self._changed:
            if self._mailboxes.get(mailbox.request_id) is mailbox:
                del self._mailboxes[mailbox.request_id]
                self._add_call(lambda: self._engine.abort_request(mailbox.request_id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have a function called in the thread, between two steps, while nothing changes: what it returns.

        Raises:
            EngineStopped: it is closed, or has failed.
        """
        self._check_process()
        with self._changed:
            if self._cause is not None:
                raise self._stopped()
            if self._deadline is not None:
                raise EngineStopped("the engine was closed: it takes no more requests.")
            return self._add_call(function)

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests. `ended` is done when those that run have ended, or after `timeout` seconds, in which
        case the rest is aborted."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
            self._changed.notify()

    def stop(self) -> None:
        """Close at once, and wait for the end of the step that is running."""
        self.close(timeout=0)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise EngineStopped("this process was forked, and the engine's thread was not: make an engine here.")

    def _add_call(self, function: Callable[[], T]) -> Future[T]:
        answer: Future[T] = Future()
        self._calls.append((function, answer))
        self._changed.notify()
        return answer

    def _stopped(self) -> EngineStopped:
        error = EngineStopped(f"the engine has stopped: {type(self._cause).__name__}: {self._cause}")
        error.__cause__ = self._cause
        return error

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._do_calls():
                if self._engine.has_unfinished():
                    self._publish(self._engine.step())
            self._engine.close()
        except BaseException as error:  # whatever it was, those who wait for outputs are told
            with self._changed:
                self._cause = error
                calls, self._calls = self._calls, deque()
            for _, answer in calls:
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(self._stopped())
            for mailbox in list(self._mailboxes.values()):
                self._refuse(mailbox, self._stopped())
        self.ended.set_result(None)

    def _do_calls(self) -> bool:
        """Do what was asked for, waiting for that if there is nothing else to do; False: it is time to end."""
        with self._changed:
            while not (self._calls or self._deadline is not None or self._engine.has_unfinished()):
                self._changed.wait()
            calls, self._calls = self._calls, deque()
            deadline = self._deadline  # as it is now: what was asked for before it was closed comes before the end
        for function, answer in calls:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(function())
                except Exception as error:
                    answer.set_exception(error)
        if deadline is None:
            return True
        if time.monotonic() >= deadline:
            for request_id in list(self._mailboxes):
                self._engine.abort_request(request_id)
        return self._engine.has_unfinished()

    def _publish(self, outputs: Iterable[RequestOutput]) -> None:
        to_wake = []
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is None or mailbox.output is not output:  # nobody reads it any more
                continue
            if output.finished:
                self._forget(mailbox)
            elif mailbox.only_finished:
                continue
            if mailbox.put(Newest(output)) or mailbox.loop.is_closed():
                to_wake.append(mailbox)
        self._wake(to_wake)

    def _refuse(self, mailbox: Mailbox, error: Exception) -> None:
        self._forget(mailbox)
        if mailbox.put(error):
            self._wake([mailbox])

    def _forget(self, mailbox: Mailbox) -> None:
        with self._changed:
            del self._mailboxes[mailbox.request_id]

    def _wake(self, mailboxes: Iterable[Mailbox]) -> None:
        """Wake tasks, each event loop once. A loop that was closed has no tasks any more."""
        by_loop = defaultdict(list)
        for mailbox in mailboxes:
            by_loop[mailbox.loop].append(mailbox)
        for loop, those in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake_all, those)
            except RuntimeError:
                for mailbox in those:
                    self.give_up(mailbox)


def _wake_all(mailboxes: list[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.wake()
