"""SIGTERM and Ctrl-C as a request to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only sets `requested`; the second acts as it always does.

    Python delivers signals to the main thread alone: elsewhere this changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
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
        self.requested = True
        self.__exit__()
