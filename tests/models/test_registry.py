"""Every family is found by its configuration, and offers what it says."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from oncelm.models.family import Family
from oncelm.models.registry import FAMILIES, family, model_class
from oncelm.utils.device import KV_DTYPES
from tests.models.small import make_long, make_model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_registered_with_transformers_and_takes_the_options_that_it_names(model_type):
    model = model_class(model_type)
    config = AutoConfig.for_model(model_type)
    assert type(config) is model.config_class
    assert AutoModelForCausalLM._model_mapping[type(config)] is model
    assert family(config) is model
    assert model.has_own_cache
    assert {"dtype", *model.cache_options} <= set(inspect.signature(model.new_cache).parameters)
    assert set(model.read_options) <= set(inspect.signature(model.prefill).parameters)
    assert set(model.result_keys) <= set(config.to_dict())


def test_other_models_of_transformers_offer_nothing_of_it():
    assert family(LlamaConfig()) is Family
    values = [value for name, value in vars(Family).items() if not name.startswith("_")]
    assert not any(value for value in values if not isinstance(value, classmethod))


@pytest.mark.parametrize("make", [lambda: make_model("retention"), make_long])
def test_a_cache_of_each_dtype_that_is_named_is_made(make):
    model = make()
    for name in model.kv_dtypes:
        cache = model.new_cache(1, 8, dtype=KV_DTYPES[name])
        model.prefill(torch.tensor([[1, 2, 3]]), cache)
        assert cache.snapshot().kv_dtype == KV_DTYPES[name]


@pytest.mark.parametrize("make", [lambda: make_model("retention"), lambda: make_model("window"), make_long])
def test_a_mark_is_returned_to_as_often_as_needed(make):
    model = make()
    ids = torch.arange(1, 31)[None]
    cache = model.new_cache(1, 40)
    model.prefill(ids[:, :20], cache)
    mark = model.mark(cache)
    expected = model.prefill(ids[:, 20:], cache)
    for _ in range(2):
        cache = model.rewind(cache, mark)
        assert cache.num_tokens == 20
        assert torch.equal(model.prefill(ids[:, 20:], cache), expected)
    reused = model.reuse(cache)
    if reused is not None:
        assert reused is cache
        assert cache.num_tokens == 0


def test_a_longllama_cache_is_as_large_as_said():
    model = make_long(mem_dtype="int8")
    cache = model.new_cache(1, memory="cpu", block_tokens=64)
    model(torch.ones(1, 70, dtype=torch.long), past_key_values=cache)  # 64 tokens in memory: one block
    stored = sum(cache.layers[i].store.nbytes() for i in model.config.mem_layers)
    local = make_long(mem_layers=[]).cache_bytes(64, torch.float32)
    assert model.cache_bytes(64, torch.float32) - local == stored
