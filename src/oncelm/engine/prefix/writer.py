"""Work that a step must not wait for: one thread that does it in order, and room for so many bytes of it.

What was submitted is done before Python ends, even if nobody closes anything. A process that was forked has a thread of
its own: what was submitted before is its parent's to do.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)
Task = Callable[[], None]


class Writer:
    """Runs tasks in a thread of its own, which lives while there are some. `room` is for bytes that wait for it."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._begin()
        atexit.register(self.flush)

    def _begin(self) -> None:
        self._process = os.getpid()
        self._waiting = 0
        self._changed = threading.Condition()
        self._tasks: deque[tuple[int, Task]] = deque()
        self._thread: threading.Thread | None = None

    def _check_process(self) -> None:
        if self._process != os.getpid():  # the thread is not here, and a lock that it held is never released
            self._begin()

    @property
    def is_behind(self) -> bool:
        """Whether so much waits that more had better come later."""
        return 2 * self._waiting > self.room

    def submit(self, task: Task, num_bytes: int = 0) -> bool:
        """Do `task` later; False where too many bytes wait. One of any size is taken when nothing else waits."""
        self._check_process()
        with self._changed:
            if num_bytes and self._waiting and self._waiting + num_bytes > self.room:
                return False
            self._waiting += num_bytes
            self._tasks.append((num_bytes, task))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="oncelm-snapshots", daemon=True)
                self._thread.start()
        return True

    def flush(self) -> None:
        """Return when all that was submitted is done."""
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)

    def close(self) -> None:
        """Flush, for the last time."""
        self.flush()
        atexit.unregister(self.flush)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    self._thread = None
                    self._changed.notify_all()
                    return
                num_bytes, task = self._tasks.popleft()
            try:
                task()
            except Exception:
                logger.exception("a snapshot could not be written")
            del task  # and with it the tensors that it holds
            with self._changed:
                self._waiting -= num_bytes
