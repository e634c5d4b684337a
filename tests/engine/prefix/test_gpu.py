"""Snapshots on a GPU: what leaves it is what was there, although the pages are written again at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oncelm.engine.pages import Pages, Slots
from oncelm.engine.pool import Pool
from oncelm.engine.prefix import PrefixCache
from oncelm.ops.quantize import as_bytes
from tests.models.small import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAGE_SIZE, NUM_PAGES, NUM_SLOTS = 64, 600, 6


def fill(pool: Pool, value: int) -> None:
    """Every byte."""
    for tensor in (*pool._of_slots.values(), *pool._of_pages.values()):
        bits = torch.full((tensor.element_size(),), value, dtype=torch.uint8, device=tensor.device).view(tensor.dtype)
        as_bytes(tensor).copy_(as_bytes(bits).expand(tensor.shape))


def is_full_of(value: int, held: dict[str, torch.Tensor]) -> bool:
    return all((tensor.contiguous().view(torch.uint8) == value).all() for tensor in held.values())


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
def test_pages_are_written_right_behind_a_copy(kv_dtype, tmp_path: Path) -> None:
    model = make_model("retention", hidden_size=512, num_key_value_heads=4).to("cuda", torch.bfloat16)
    pool = Pool(model, NUM_PAGES, PAGE_SIZE, NUM_SLOTS, kv_dtype)
    options = {"cpu_bytes": 1 << 30, "directory": tmp_path}
    cache = PrefixCache(pool, Pages(NUM_PAGES), Slots(NUM_SLOTS), model.fingerprint(), **options)
    n = 500 * PAGE_SIZE + 7
    for value in range(1, 21):
        slot, pages = cache.slots.allocate(), cache.pages.allocate(-(-n // PAGE_SIZE))
        fill(pool, value)
        cache.add([value] * n, n, slot, pages)
        cache.pages.release(pages)
        cache.slots.release(slot)
        assert cache.free(NUM_PAGES - 1, NUM_SLOTS - 1)
        fill(pool, 99)  # whoever has them next
        slot = cache.slots.allocate()
        pages = cache.restore(cache.match([value] * (n + 1)), slot, cache.pages.allocate)
        held = {**pool.read_slot(slot), **pool.read_rows(pages, 0, n)}
        assert is_full_of(value, held)
        cache.pages.release(pages)
        cache.slots.release(slot)
        assert cache.free(NUM_PAGES - 1, NUM_SLOTS - 1)  # what was restored is a snapshot on the device again
    cache.close()
    again = PrefixCache(pool, Pages(NUM_PAGES), Slots(NUM_SLOTS), model.fingerprint(), directory=tmp_path)
    for value in (1, 20):
        slot = again.slots.allocate()
        pages = again.restore(again.match([value] * (n + 1)), slot, again.pages.allocate)
        held = {**pool.read_slot(slot), **pool.read_rows(pages, 0, n)}
        assert is_full_of(value, held)
        again.pages.release(pages)
        again.slots.release(slot)
        assert again.free(NUM_PAGES - 1, NUM_SLOTS - 1)
