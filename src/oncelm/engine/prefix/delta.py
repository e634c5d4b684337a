"""What lies between a snapshot and its parent, off the device: rows of keys and values, and the states at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from oncelm.ops.quantize import as_bytes

ROWS_AT_ONCE = 16_384  # gathered on the device at a time: memory is short when snapshots leave it

Tensors = Mapping[str, torch.Tensor]


class Storage(Protocol):
    """What is asked of the pool (cache/yoco/pool.py)."""

    page_size: int

    @property
    def device(self) -> torch.device: ...
    def copy_slot(self, source: int, target: int) -> None: ...
    def copy_page(self, source: int, target: int) -> None: ...
    def read_slot(self, slot: int) -> dict[str, torch.Tensor]: ...
    def write_slot(self, slot: int, tensors: dict[str, torch.Tensor]) -> None: ...
    def read_rows(self, pages: Sequence[int], start: int, stop: int) -> dict[str, torch.Tensor]: ...
    def write_rows(self, pages: Sequence[int], start: int, tensors: dict[str, torch.Tensor]) -> None: ...


@dataclass(eq=False, slots=True)
class Delta:
    """Rows [start, stop) of keys and values, and states after `stop` tokens, in CPU memory.

    Attributes:
        rows: by the pool's names, [stop - start, ...].
        states: by the pool's names.
        ready: the event of a copy from a GPU that may still be under way; `wait` for it before reading.
    """

    rows: dict[str, torch.Tensor]
    states: dict[str, torch.Tensor]
    ready: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes: torch rounds pinned memory up to a power of two."""
        return sum(
            1 << (tensor.nbytes - 1).bit_length() if tensor.nbytes and tensor.is_pinned() else tensor.nbytes
            for tensor in (*self.rows.values(), *self.states.values())
        )

    def wait(self) -> Delta:
        """Return when its bytes are there."""
        if (ready := self.ready) is not None:
            ready.synchronize()
            self.ready = None
        return self


def copy_off(pool: Storage, slot: int, pages: Sequence[int], start: int, stop: int) -> Delta:
    """Copy rows [start, stop) of `pages`, and a slot, to CPU memory.

    Slot and pages may be given to others as soon as this returns. On a GPU the copy may still be under way then, but it
    is in the same stream as all that the engine computes: what writes there next comes after it. The host, which no
    stream holds back, waits for `ready` before it reads the copy.
    """
    states = {name: _to_host(tensor) for name, tensor in pool.read_slot(slot).items()}
    rows: dict[str, torch.Tensor] = {}
    for first in range(start, stop, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, stop)
        for name, part in pool.read_rows(pages, first, last).items():
            if name not in rows:
                rows[name] = _empty((stop - start, *part.shape[1:]), part)
            as_bytes(rows[name])[first - start : last - start].copy_(as_bytes(part), non_blocking=True)
    return Delta(rows, states, _event(pool.device))


def write_back(pool: Storage, delta: Delta, pages: Sequence[int], start: int) -> None:
    """Write the rows of a delta, the first one at position `start` of `pages`."""
    delta.wait()
    for first, part in _parts(delta.rows):
        pool.write_rows(pages, start + first, _to_device(part, pool.device))


def write_states(pool: Storage, delta: Delta, slot: int) -> None:
    delta.wait()
    pool.write_slot(slot, _to_device(delta.states, pool.device))


def _parts(rows: Tensors) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    total = max((len(tensor) for tensor in rows.values()), default=0)
    for first in range(0, total, ROWS_AT_ONCE):
        yield first, {name: tensor[first : first + ROWS_AT_ONCE] for name, tensor in rows.items()}


def _to_device(tensors: Tensors, device: torch.device) -> dict[str, torch.Tensor]:
    """Pinned memory that is given back while it is copied is not used again before the copy is over (torch sees to it),
    so the host does not wait."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    copy = _empty(tuple(tensor.shape), tensor)
    as_bytes(copy).copy_(as_bytes(tensor), non_blocking=True)
    return copy


def _event(device: torch.device) -> Any:
    """An event behind all that was asked of the device so far; None of a CPU, which does as it is told."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
