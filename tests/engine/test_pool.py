"""Slots and pages: their sizes are known before they are allocated, and what is copied or moved is all of it."""

from __future__ import annotations

import pytest
import torch

from oncelm.engine.pool import Pool
from oncelm.engine.runner import Runner
from oncelm.engine.work import Piece
from tests.models.small import KINDS, make_model

DTYPES = [None, torch.bfloat16, torch.float8_e4m3fn, torch.int8]


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_known_before(kind: str, kv_dtype: torch.dtype | None) -> None:
    model = make_model(kind)
    pool = Pool(model, num_pages=7, page_size=4, num_slots=3, kv_dtype=kv_dtype)
    slot = Pool.slot_bytes(model.config, model.dtype, kv_dtype)
    page = Pool.page_bytes(model.config, 4, model.dtype, kv_dtype)
    assert pool.nbytes() == 3 * slot + 7 * page
    assert (page > 0) == (kind != "retention-only")
    assert (slot > 0) == (kind not in ("cross-only", "full"))


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hybrid", "delta"])
def test_what_is_read_can_be_written_elsewhere(kind: str, kv_dtype: torch.dtype | None) -> None:
    model = make_model(kind)
    pool = Pool(model, 9, 4, 4, kv_dtype)
    runner = Runner(model, pool, max_num_seqs=2, max_pages=4)
    runner.prefill([Piece(1, [3, 1, 2], 0, list(range(10)))])
    held, rows = pool.read_slot(1), pool.read_rows([3, 1, 2], 2, 10)
    assert all(len(tensor) == 8 for tensor in rows.values())
    pool.write_slot(3, {name: tensor.cpu() for name, tensor in held.items()})
    pool.write_rows([5, 4, 6], 2, rows)
    pool.copy_slot(3, 2)
    pool.copy_page(6, 7)
    for found, expected in ((pool.read_slot(2), held), (pool.read_rows([5, 4, 7], 2, 10), rows)):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor.float(), expected[name].float())
    before = pool.read_slot(3)
    pool.clear_slot(2)
    assert not any(tensor.any() for tensor in pool.read_slot(2).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.read_slot(3).items())


def test_a_cache_without_a_form_for_pools_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from oncelm.cache import RecurrentState

    monkeypatch.delattr(RecurrentState, "pool_form")
    with pytest.raises(ValueError, match=r"layers\.0: RecurrentState has no pool_form"):
        Pool(make_model("retention"), 2, 4, 2)


@pytest.mark.parametrize("name", ["num_pages", "page_size", "num_slots"])
def test_sizes_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        Pool(make_model("retention"), **({"num_pages": 2, "page_size": 4, "num_slots": 2} | {name: 0}))
