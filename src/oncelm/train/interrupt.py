"""SIGTERM and Ctrl-C as a request to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

# One stop may arrive twice: a batch system signals all processes, and torchrun passes on what it got itself.
ECHO_SECONDS = 3.0


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only sets `requested`; one later than its echo acts as always.

    Python delivers signals to the main thread alone: elsewhere this changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since > ECHO_SECONDS:
            self.__exit__()
            signal.raise_signal(number)
