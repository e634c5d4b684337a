"""How memory is divided before it is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from oncelm.engine import plan as planning
from oncelm.engine.plan import MemoryPlan, plan_memory
from oncelm.engine.pool import Pool
from oncelm.models import YocoConfig
from oncelm.models.yoco.presets import PRESETS
from tests.models.small import make_model


def plan_of(model: Any = None, **options: Any) -> MemoryPlan:
    settings = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 4, "max_num_batched_tokens": 16} | options
    return plan_memory(model or make_model("retention"), **settings)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_pool_takes_what_is_planned(kv_cache_dtype) -> None:
    model = make_model("hybrid")
    plan = plan_of(model, kv_cache_bytes=90_000, num_snapshots=4, kv_cache_dtype=kv_cache_dtype)
    dtype = None if kv_cache_dtype == "auto" else torch.int8
    pool = Pool(model, plan.num_pages, plan.page_size, plan.num_slots, dtype)
    assert pool.nbytes() == plan.num_pages * plan.page_bytes + plan.num_slots * plan.slot_bytes
    assert pool.nbytes() <= 90_000 < pool.nbytes() + plan.page_bytes


def test_no_more_than_anybody_could_use() -> None:
    plan = plan_of(kv_cache_bytes=2**40, num_snapshots=3)
    assert plan.num_tokens == (4 + 3) * 64
    assert plan.num_slots == 1 + 4 + 3


def test_snapshots_take_a_tenth_of_the_memory() -> None:
    model = make_model("retention", hidden_size=64)
    plan = plan_of(model, kv_cache_bytes=2**20)
    assert 0 < plan.num_snapshots * plan.slot_bytes <= 2**20 / 10
    assert plan_of(model, kv_cache_bytes=2**20, num_snapshots=0).num_snapshots == 0


def test_the_longest_request_follows_from_the_memory_if_it_is_not_given() -> None:
    model = make_model("retention", max_position_embeddings=1000)
    assert plan_of(model, max_model_len=None, kv_cache_bytes=2**24).max_model_len == 1000
    plan = plan_of(model, max_model_len=None, kv_cache_bytes=60_000)
    assert plan.max_model_len == plan.num_tokens < 1000


def test_too_little_memory_is_told_with_what_would_fit() -> None:
    with pytest.raises(
        ValueError, match=r"kv_cache_bytes leaves 58\.6 KiB .* pages for (\d+) tokens.*max_model_len=4,096"
    ):
        plan_of(max_model_len=4096, kv_cache_bytes=60_000)
    with pytest.raises(ValueError, match="pages for 0 tokens"):
        plan_of(max_model_len=None, kv_cache_bytes=10)


def test_a_share_of_a_machine_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200_000))
    plan = plan_of()
    assert plan.budget == 100_000
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**50))
    assert plan_of().budget == planning.MOST_ON_CPU


def test_a_share_of_a_gpu(monkeypatch) -> None:
    """YOCO's 3B on an H200, as far as numbers go: nothing is on a GPU here."""
    gigabyte = 2**30
    config = YocoConfig(**{**PRESETS["yoco-3b"], "max_position_embeddings": 131072})
    weights = SimpleNamespace(nbytes=6 * gigabyte)
    model = SimpleNamespace(
        config=config, device=torch.device("cuda"), dtype=torch.bfloat16, parameters=lambda: [weights], buffers=list
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=140 * gigabyte)
    )
    monkeypatch.setattr(planning, "free_memory", lambda device: 133 * gigabyte)
    options: dict[str, Any] = {"max_model_len": None, "page_size": 256, "max_num_batched_tokens": 16384}
    plan = plan_memory(model, max_num_seqs=256, **options)
    assert plan.budget < (0.9 * 140 - 7) * gigabyte
    held = plan.num_tokens // 131072
    assert 190 < held < 230
    assert f"room for {held} sequences of 131,072 tokens" in plan.table()
    plan = plan_memory(model, max_num_seqs=512, kv_cache_dtype="int8", **options)
    assert plan.num_tokens // 131072 > 1.7 * held
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=0\.1 leaves"):
        plan_memory(model, max_num_seqs=256, gpu_memory_utilization=0.1, **options)
