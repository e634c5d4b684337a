"""Loading the next batches while the current one is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import Tensor

from oncelm.data.conversations import ConversationDataset
from oncelm.data.crossbatch import CrossbatchDataset
from oncelm.data.dataset import TokenDataset


class ReadAhead:
    """A dataset whose next batches are read by a thread: same batches, asked for in the same way.

    A batch is a pure function of its step, so reading ahead is guessing the next arguments: those of the last call
    with the step after. A wrong guess costs time, never correctness. An error is raised by the call it belongs to.

    Args:
        dataset: to read.
        depth: steps to be ahead.
        pin_memory: put batches into page-locked memory, from which a copy to a GPU does not wait (`non_blocking=True`).
    """

    def __init__(
        self,
        dataset: TokenDataset | CrossbatchDataset | ConversationDataset,
        depth: int = 2,
        *,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.depth, self.pin_memory = dataset, depth, pin_memory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: dict[tuple[Any, ...], Future[Tensor]] = {}  # by method, step, batch size, rows

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; what it is reading is finished, the rest forgotten."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()

    def batch(self, step: int, batch_size: int, rows: slice | None = None) -> Tensor:
        return self._get("batch", step, batch_size, rows)

    def cu_seqlens(self, step: int, batch_size: int, rows: slice | None = None) -> Tensor:
        return self._get("cu_seqlens", step, batch_size, rows)

    def validation_batches(self, batch_size: int) -> Iterator[Tensor]:
        return self.dataset.validation_batches(batch_size)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.dataset, name)  # an error where the dataset has none: not every one has labels
        return partial(self._get, name) if name == "labels" else found  # the rest takes no time

    def _get(self, method: str, step: int, batch_size: int, rows: slice | None) -> Tensor:
        span = (rows or slice(None)).indices(batch_size)
        wanted = self._ahead.pop((method, step, batch_size, span), None)
        if wanted is None:
            wanted = self._submit(method, step, batch_size, span)
        for later in range(step + 1, step + 1 + self.depth):
            key = (method, later, batch_size, span)
            if key not in self._ahead:
                self._ahead[key] = self._submit(*key)
        # guesses that did not come true
        for key in [key for key in self._ahead if not step <= key[1] <= step + self.depth]:
            self._ahead.pop(key).cancel()
        return wanted.result()

    def _submit(self, method: str, step: int, batch_size: int, span: tuple[int, int, int]) -> Future[Tensor]:
        return self._pool.submit(self._load, method, step, batch_size, slice(*span))

    def _load(self, method: str, step: int, batch_size: int, rows: slice) -> Tensor:
        tensor = getattr(self.dataset, method)(step, batch_size, rows)
        return tensor.pin_memory() if self.pin_memory else tensor
