"""A device and a model, as small as can be, in the place of the pool and the runner.

What a token's row and a text's state are follows from the text, and from who computed it: a `flavour` stands for the
rounding of another schedule. So what was restored can be compared with what must be there, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oncelm.engine.pages import Pages, Slots
from oncelm.engine.prefix.cache import PrefixCache
from oncelm.engine.prefix.tree import Snapshot

SMALL_BLOCK = 8  # tokens, see conftest.py
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8)


class FakePool:
    """The storage's interface on plain tensors: `k` rows of 2 numbers, with a scale if in 8 bits; one state."""

    def __init__(self, num_pages: int, page_size: int, num_slots: int, dtype: torch.dtype = torch.float32) -> None:
        self.page_size, self.device = page_size, torch.device("cpu")
        self.rows = {"shared.k": torch.zeros(num_pages, page_size, 2, 1, dtype=torch.float32).to(dtype)}
        if dtype.itemsize == 1:
            self.rows["shared.k_scale"] = torch.zeros(num_pages, page_size, 2)
        self.states = {"layers.0.state": torch.zeros(num_slots, 3), "layers.1.k": torch.zeros(num_slots, 2).to(dtype)}

    def copy_slot(self, source: int, target: int) -> None:
        for state in self.states.values():
            _bytes(state)[target] = _bytes(state)[source]

    def copy_page(self, source: int, target: int) -> None:
        for rows in self.rows.values():
            _bytes(rows)[target] = _bytes(rows)[source]

    def read_slot(self, slot: int) -> dict[str, torch.Tensor]:
        return {name: state[slot].clone() for name, state in self.states.items()}

    def write_slot(self, slot: int, tensors: dict[str, torch.Tensor]) -> None:
        assert tensors.keys() == self.states.keys()
        for name, tensor in tensors.items():
            _bytes(self.states[name])[slot] = _bytes(tensor)

    def read_rows(self, pages: Sequence[int], start: int, stop: int) -> dict[str, torch.Tensor]:
        where = self._where(pages, start, stop)
        return {name: _bytes(rows)[where].view(rows.dtype) for name, rows in self.rows.items()}

    def write_rows(self, pages: Sequence[int], start: int, tensors: dict[str, torch.Tensor]) -> None:
        assert tensors.keys() == self.rows.keys()
        for name, tensor in tensors.items():
            _bytes(self.rows[name])[self._where(pages, start, start + len(tensor))] = _bytes(tensor)

    def _where(self, pages: Sequence[int], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(start, stop)
        return torch.tensor(list(pages))[positions // self.page_size], positions % self.page_size


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.element_size() == 1 else x


class FakeRequest:
    """Reads tokens into a slot and pages, as the runner would."""

    def __init__(self, device: Device, tokens: Sequence[int], flavour: int = 0, salt: str | None = None) -> None:
        self.device, self.tokens, self.flavour, self.salt = device, list(tokens), flavour, salt
        slot = device.slots.allocate()
        assert slot is not None
        self.slot, self.pages, self.n = slot, [], 0
        self.after: Snapshot | None = None

    def resume(self) -> int:
        """Restore the longest snapshot; n."""
        match = self.device.cache.match(self.tokens, self.salt)
        pages = self.device.cache.restore(match, self.slot, self.device.allocate)
        if pages is None:
            return 0
        self.pages, self.n, self.after = pages, match.n, match.snapshot
        return match.n

    def read(self, n: int) -> None:
        """Go on to position n."""
        device = self.device
        need = -(-n // device.pool.page_size) - len(self.pages)
        if need > 0:
            pages = device.allocate(need)
            assert pages is not None
            self.pages += pages
        if n > self.n:
            device.pool.write_rows(self.pages, self.n, device.rows(self.tokens, self.n, n, self.flavour))
        device.pool.write_slot(self.slot, device.states(self.tokens, n, self.flavour))
        self.n = n

    def add(self) -> Snapshot | None:
        self.after = self.device.cache.add(self.tokens, self.n, self.slot, self.pages, self.salt, after=self.after)
        return self.after

    def content(self) -> dict[str, torch.Tensor]:
        """All bits of what it has."""
        pool = self.device.pool
        held = {**pool.read_rows(self.pages, 0, self.n), **pool.read_slot(self.slot)}
        return {name: _bytes(tensor).clone() for name, tensor in held.items()}

    def end(self) -> None:
        self.device.pages.release(self.pages)
        self.device.slots.release(self.slot)
        self.pages, self.slot = [], 0


class Device:
    """A pool, who holds it, and a prefix cache on it."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        num_slots: int = 16,
        dtype: torch.dtype = torch.float32,
        fingerprint: str = "model",
        **options: Any,
    ) -> None:
        self.dtype = dtype
        self.pool = FakePool(num_pages, page_size, num_slots, dtype)
        self.pages, self.slots = Pages(num_pages), Slots(num_slots)
        self.cache = PrefixCache(self.pool, self.pages, self.slots, fingerprint, **options)

    def allocate(self, count: int) -> list[int] | None:
        if self.pages.num_free < count:
            self.cache.free(num_pages=count)
        return self.pages.allocate(count)

    def request(self, tokens: Sequence[int], flavour: int = 0, salt: str | None = None) -> FakeRequest:
        if not self.slots.num_free:
            self.cache.free(num_slots=1)
        return FakeRequest(self, tokens, flavour, salt)

    def remember(self, tokens: Sequence[int], *, flavour: int = 0, salt: str | None = None) -> dict[str, torch.Tensor]:
        """Read all of a text, from where it is known, and leave a snapshot there; what is in it."""
        request = self.request(tokens, flavour, salt)
        request.resume()
        request.read(len(tokens))
        request.add()
        content = request.content()
        request.end()
        return content

    def recall(self, tokens: Sequence[int], salt: str | None = None) -> tuple[int, dict[str, torch.Tensor]]:
        """What is restored for a request with these tokens."""
        request = self.request(tokens, salt=salt)
        n = request.resume()
        content = request.content() if n else {}
        request.end()
        return n, content

    def check(self) -> None:
        """That nothing leaks: whoever holds pages and slots is a snapshot, each as often as it should."""
        self.pages.check()
        self.slots.check()
        held: dict[int, int] = {}
        on_device = [snapshot for snapshot in self.cache.tree if snapshot.slot]
        for snapshot in on_device:
            for page in snapshot.pages:
                held[page] = held.get(page, 0) + 1
        assert {page: self.pages.references(page) for page in held} == held
        assert self.pages.num_used == len(held)
        assert self.slots.num_used == len({snapshot.slot for snapshot in on_device}) == len(on_device)

    # -- the model ------------------------------------------------------------------------------------------------

    def rows(self, tokens: Sequence[int], start: int, stop: int, flavour: int) -> dict[str, torch.Tensor]:
        sums = torch.tensor(tokens).cumsum(0)[start:stop]
        values = torch.stack((sums % 97, sums % 89 + flavour * 0.25), dim=1)[..., None].float()
        made = {"shared.k": values.to(self.dtype)}
        if "shared.k_scale" in self.pool.rows:
            made["shared.k_scale"] = (sums[:, None] * torch.tensor([1.0, 2.0]) + flavour) / 7
        return made

    def states(self, tokens: Sequence[int], n: int, flavour: int) -> dict[str, torch.Tensor]:
        seen = torch.tensor(tokens[:n]).double()
        weights = torch.arange(1, n + 1).double()
        state = torch.stack((seen.sum(), (seen * weights).sum(), torch.tensor(n + flavour / 8).double()))
        last = torch.tensor([tokens[n - 1] % 50, n % 50]).float()
        return {"layers.0.state": state.float(), "layers.1.k": last.to(self.dtype)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def text(length: int, seed: int = 0) -> list[int]:
    """Tokens of a text that goes on the same way however long it is."""
    return [(i * 7919 + seed * 104729 + i * i) % 1000 for i in range(length)]
