"""Loading the next batches while the current one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from oncelm.data.batch import TrainBatch, TrainData


class ReadAhead:
    """Batches of a data set, and their numbers of targets, of which a thread makes the next ones meanwhile.

    A batch is a pure function of its step, so reading ahead is guessing the next arguments: those of the last call
    with the step after. A wrong guess costs time, never correctness. An error is raised by the call it belongs to.

    Args:
        data: to read.
        depth: steps to be ahead.
        pin_memory: put batches into page-locked memory, from which a copy to a GPU does not wait (`non_blocking=True`).
    """

    def __init__(self, data: TrainData, depth: int = 2, *, pin_memory: bool = False) -> None:
        self.data, self.depth, self.pin_memory = data, depth, pin_memory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: dict[tuple[Any, ...], Future[Any]] = {}  # by what is read, step, count, rows

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; what it is reading is finished, the rest forgotten."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()

    def batch(self, step: int, count: int, rows: slice | None = None) -> TrainBatch:
        """As the data's."""
        return self._get(self._read, step, count, (rows or slice(None)).indices(count))

    def num_targets(self, step: int, count: int) -> int:
        """As the data's."""
        return self._get(self.data.num_targets, step, count)

    def _read(self, step: int, count: int, span: tuple[int, int, int]) -> TrainBatch:
        batch = self.data.batch(step, count, slice(*span))
        return batch.pin_memory() if self.pin_memory else batch

    def _get(self, read: Callable[..., Any], step: int, *rest: Any) -> Any:
        wanted = self._ahead.pop((read, step, *rest), None) or self._pool.submit(read, step, *rest)
        for later in range(step + 1, step + 1 + self.depth):
            if (read, later, *rest) not in self._ahead:
                self._ahead[read, later, *rest] = self._pool.submit(read, later, *rest)
        # guesses that did not come true
        for key in [key for key in self._ahead if not step <= key[1] <= step + self.depth]:
            self._ahead.pop(key).cancel()
        return wanted.result()
