"""The prefix cache on the engine's own pool: each kind of state and of keys and values, whatever bits are in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oncelm.engine.pages import Pages, Slots
from oncelm.engine.pool import Pool
from oncelm.engine.prefix import PrefixCache
from tests.models.small import make_model

N, PAGE_SIZE = 13, 4


def content(pool: Pool, slot: int, pages: list[int]) -> dict[str, torch.Tensor]:
    held = {**pool.read_slot(slot), **pool.read_rows(pages, 0, N)}
    return {name: tensor.contiguous().view(torch.uint8).clone() for name, tensor in held.items()}


def fill(pool: Pool, seed: int) -> None:
    """Any bits, those of no number among them."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*pool._of_slots.values(), *pool._of_pages.values()):
        of_bits = {1: torch.uint8, 4: torch.int32}[tensor.element_size()]
        low, high = torch.iinfo(of_bits).min, torch.iinfo(of_bits).max
        bits = torch.randint(low, high, tensor.shape, generator=generator, dtype=of_bits)
        tensor.view(of_bits).copy_(bits)


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("kind", ["delta", "hybrid", "retention-only"])
def test_bits_come_back_from_everywhere(kind, kv_dtype, tmp_path: Path) -> None:
    model, tokens = make_model(kind), list(range(N))

    def start(**options) -> PrefixCache:
        pool = Pool(model, 12, PAGE_SIZE, 5, kv_dtype)
        fill(pool, 1)
        return PrefixCache(pool, Pages(12), Slots(5), model.fingerprint(), **options)

    def restored(cache: PrefixCache) -> dict[str, torch.Tensor]:
        slot = cache.slots.allocate()
        pages = cache.restore(cache.match([*tokens, 5]), slot, cache.pages.allocate)
        held = content(cache.pool, slot, pages)
        cache.pages.release(pages)
        cache.slots.release(slot)
        return held

    cache = start(cpu_bytes=1 << 20, directory=tmp_path)
    slot, pages = cache.slots.allocate(), cache.pages.allocate(-(-N // PAGE_SIZE))
    made = content(cache.pool, slot, pages)
    first = cache.add(tokens, 7, slot, pages)
    cache.add(tokens, N, slot, pages, after=first)
    cache.pages.release(pages)
    cache.slots.release(slot)

    def check(cache: PrefixCache) -> None:
        held = restored(cache)
        assert held.keys() == made.keys()
        assert all(torch.equal(held[name], made[name]) for name in made)

    check(cache)
    assert cache.free(cache.pages.num_pages - 1, cache.slots.num_slots - 1)
    fill(cache.pool, 2)
    check(cache)
    cache.close()
    check(start(directory=tmp_path))
