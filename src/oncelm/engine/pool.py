"""The storage of an engine: slots for states and windows, pages for keys and values of all tokens.

A sequence at position n has the states after exactly n tokens in its slot, and the keys and values of its first n
tokens in its pages. Slot 0 and page 0 are scratch: rows that only fill up a batch write there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oncelm.cache import Pasts
from oncelm.cache.yoco.places import Places
from oncelm.models import YocoConfig, YocoForCausalLM
from oncelm.models.yoco.mixers import Room
from oncelm.ops.attention import PAGE_SIZES
from oncelm.ops.quantize import LARGEST, as_bytes
from oncelm.utils.errors import check_whole

Tensors = dict[str, torch.Tensor]


class Pool:
    """`num_slots` slots and `num_pages` pages of `page_size` tokens, the scratch ones included.

    Args:
        model: whose states, keys and values they are for.
        page_size: tokens of a page; on a GPU 16, 32, 64, 128 or 256.
        kv_dtype: of keys and values; None: the model's. See `YocoModel.new_cache`.

    Attributes:
        stores: all that holds tensors, by name ("layers.3", "shared"), each [num_slots, ...] or, of keys and values of
            all tokens, [num_pages, page_size, ...].

    Raises:
        ValueError: another page size; a mixer whose cache has no form for a pool.
        torch.OutOfMemoryError, ValueError: no memory for it, on a GPU and on a CPU.
    """

    def __init__(
        self,
        model: YocoForCausalLM,
        num_pages: int,
        page_size: int,
        num_slots: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        check_whole(1, num_pages=num_pages, page_size=page_size, num_slots=num_slots)
        self.device, self.kv_dtype = model.cache_device, kv_dtype or model.dtype
        if self.device.type == "cuda" and page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {sorted(PAGE_SIZES)} on a GPU, got {page_size}.")
        self.num_pages, self.page_size, self.num_slots = num_pages, page_size, num_slots
        rooms = (_room(count, page_size, self.kv_dtype, model.dtype, self.device) for count in (num_slots, num_pages))
        self.stores = model.new_stores(model.config, *rooms)
        for name, store in self.stores.items():
            if not hasattr(store, "pool_form"):
                raise ValueError(f"{name}: {type(store).__name__} has no pool_form, which an engine needs of a cache.")
        self._of_slots = self._tensors(grows=False)
        self._of_pages = self._tensors(grows=True)

    def _tensors(self, grows: bool) -> Tensors:
        return {
            f"{name}.{part}": getattr(store, part)
            for name, store in self.stores.items()
            if store.grows == grows
            for part in store.tensor_names
        }

    # -- how large it is ------------------------------------------------------------------------------------------

    @staticmethod
    def slot_bytes(config: YocoConfig, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> int:
        """Bytes of a slot of a model in `dtype`."""
        return _nbytes(config, 1, dtype, kv_dtype, grows=False)

    @staticmethod
    def page_bytes(config: YocoConfig, page_size: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> int:
        """Bytes of a page of a model in `dtype`; 0 where nothing is kept of all tokens."""
        return _nbytes(config, page_size, dtype, kv_dtype, grows=True)

    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(tensor.nbytes for tensor in (*self._of_slots.values(), *self._of_pages.values()))

    def release(self) -> None:
        """Give the memory back, for good."""
        for tensors in (self.stores, self._of_slots, self._of_pages):
            tensors.clear()

    # -- slots ----------------------------------------------------------------------------------------------------

    def clear_slot(self, slot: int) -> None:
        """As before the first token."""
        for tensor in self._of_slots.values():
            tensor[slot].zero_()

    def copy_slot(self, source: int, target: int) -> None:
        for tensor in self._of_slots.values():
            tensor[target].copy_(tensor[source])

    def read_slot(self, slot: int) -> Tensors:
        """Copies of what is in a slot, by name ("layers.3.state"), on the pool's device."""
        return {name: tensor[slot].clone() for name, tensor in self._of_slots.items()}

    def write_slot(self, slot: int, tensors: Tensors) -> None:
        """Put there what `read_slot` gave, from any device."""
        for name, tensor in self._of_slots.items():
            tensor[slot].copy_(tensors[name], non_blocking=True)

    # -- pages ----------------------------------------------------------------------------------------------------

    def copy_page(self, source: int, target: int) -> None:
        for tensor in self._of_pages.values():
            as_bytes(tensor)[target].copy_(as_bytes(tensor)[source])

    def read_rows(self, pages: Sequence[int], start: int, stop: int) -> Tensors:
        """Copies of what is kept of the tokens start..stop-1 of a sequence with these pages: by name ("shared.k")
        [stop - start, ...], on the pool's device."""
        where = self._where(pages, start, stop)
        return {name: as_bytes(tensor)[where].view(tensor.dtype) for name, tensor in self._of_pages.items()}

    def write_rows(self, pages: Sequence[int], start: int, tensors: Tensors) -> None:
        """Put there, from position `start` on, what `read_rows` gave, from any device."""
        for name, tensor in self._of_pages.items():
            where = self._where(pages, start, start + len(tensors[name]))
            as_bytes(tensor)[where] = as_bytes(tensors[name]).to(self.device, non_blocking=True)

    def _where(self, pages: Sequence[int], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The page and the row in it of the tokens at positions start..stop-1."""
        first, size = start // self.page_size, self.page_size
        used = torch.tensor([*pages[first : -(-stop // size)]], dtype=torch.long).to(self.device, non_blocking=True)
        positions = torch.arange(start, stop, device=self.device)
        return used[positions // size - first], positions % size

    # -- a forward pass -------------------------------------------------------------------------------------------

    def pasts(self, places: Places) -> Pasts:
        """The past of the sequences that have these places."""
        forms = {name: store.pool_form(places) for name, store in self.stores.items()}
        shared = forms.pop("shared", None)
        return Pasts(list(forms.values()), shared)


def _room(count: int, page_size: int, kv_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> Room:
    """For `count` slots or pages. A window has a float dtype, the model's where `kv_dtype` is of 8 bits."""
    return Room(count, page_size, kv_dtype, dtype if kv_dtype in LARGEST else kv_dtype, device)


def _nbytes(config: YocoConfig, page_size: int, dtype: torch.dtype, kv_dtype: torch.dtype | None, grows: bool) -> int:
    """Bytes of one page, or of one slot."""
    room = _room(1, page_size, kv_dtype or dtype, dtype, torch.device("meta"))
    stores = YocoForCausalLM.new_stores(config, room, room).values()
    return sum(getattr(store, part).nbytes for store in stores if store.grows == grows for part in store.tensor_names)
