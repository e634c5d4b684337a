"""What is done to any torch module: compiling, copying, pickling, another dtype."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.interop.families import assert_near, close, draw_ids, families, flat, make, make_one_window

pytestmark = pytest.mark.slow


@families
@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(family: str) -> None:
    """Also in the middle of a text: what was remembered of the first model's steps is not the copy's."""
    model, ids = make_one_window(family), draw_ids(1, 20)
    expected = model(ids, use_cache=False).logits
    cache = model(ids[:, :10], use_cache=True).past_key_values
    for t in range(10, 14):
        model(ids[:, t : t + 1], past_key_values=cache)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        torch.testing.assert_close(other(ids, use_cache=False).logits, expected)
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(other.generate(ids, max_new_tokens=4, do_sample=False), tokens)
        for p in other.parameters():
            p.mul_(0.5)
        assert not torch.allclose(other(ids, use_cache=False).logits, expected, atol=1e-2)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        hidden = other.base_model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(other.get_output_embeddings()(hidden), other(ids, use_cache=False).logits, **close)


@families
@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself(family: str) -> None:
    """As one prompt is read once, and answered several times."""
    model, ids = make_one_window(family), draw_ids(1, 20)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    copies = [copy.deepcopy(cache) for _ in range(2)]
    expected = model(ids, use_cache=False).logits[:, 10:]
    model(draw_ids(1, 7, seed=9), past_key_values=copies[0])
    for held in (cache, copies[1]):
        torch.testing.assert_close(model(ids[:, 10:], past_key_values=held).logits, expected, **close)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_another_dtype(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = make_one_window(family), draw_ids(1, 20)
    expected = model(ids, use_cache=False).logits
    model.to(dtype)
    assert model.dtype == dtype
    found = model(ids, use_cache=True)
    most = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
    assert found.logits.dtype == dtype
    assert (found.logits - expected).norm() / expected.norm() < most
    model.generate(ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(flat(again.parameters()), flat(model.parameters()))


@families
@torch.no_grad()
def test_autocast_computes_in_its_dtype(family: str) -> None:
    model, ids = make_one_window(family), draw_ids(2, 20)
    expected = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, labels=ids)
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert found.logits.dtype == torch.bfloat16
    assert (found.logits - expected).norm() / expected.norm() < 0.05
    loss = torch.nn.functional.cross_entropy(found.logits[:, :-1].float().mT, ids[:, 1:])
    torch.testing.assert_close(found.loss.float(), loss, rtol=1e-3, atol=1e-3)
    assert tokens.shape == (2, 24)


@families
def test_torch_compile_of_the_whole_model(family: str) -> None:
    """Whatever it cannot compile it leaves to Python; the eager backend keeps the test short."""
    model, ids = make(family), draw_ids(2, 48)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradient = flat(p.grad for p in model.parameters())
    model.zero_grad()
    found = torch.compile(model, backend="eager")(ids, labels=ids)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, **close)
    assert_near(flat(p.grad for p in model.parameters()), gradient)


@families
def test_resized_embeddings(family: str, tmp_path: Path) -> None:
    """As for added special tokens; logits of the earlier tokens stay."""
    model, ids = make_one_window(family), draw_ids(1, 20)
    expected = model(ids, use_cache=False).logits
    model.resize_token_embeddings(272, mean_resizing=False)
    assert model.config.vocab_size == 272
    found = model(ids, labels=torch.full_like(ids, 271))
    assert found.logits.shape == (1, 20, 272)
    torch.testing.assert_close(found.logits[..., :260], expected)
    assert found.loss.isfinite()
    model(torch.full_like(ids, 271))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    model.generate(ids, max_new_tokens=4, do_sample=False)


@families
def test_tied_weights_stay_one(family: str, tmp_path: Path) -> None:
    model, ids = make(family, tie_word_embeddings=True), draw_ids(1, 48)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert copy.deepcopy(model).get_output_embeddings().weight is not model.get_output_embeddings().weight
    found = model(ids, labels=ids)
    found.loss.backward()
    expected = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits[:, :-1].mT, ids[:, 1:]).backward()
    torch.testing.assert_close(expected, model.get_input_embeddings().weight.grad, **close)


@families
def test_small_shards(family: str, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(flat(AutoModelForCausalLM.from_pretrained(tmp_path).parameters()), flat(model.parameters()))
