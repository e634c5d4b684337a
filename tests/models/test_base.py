"""Models without a head: what AutoModel loads, hidden states of any positions and of all layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from oncelm.models.longllama import LongLlamaModel
from oncelm.models.yoco import YocoModel
from tests.models.small import KINDS, VOCAB, make_long, make_model

close = {"rtol": 1e-4, "atol": 1e-5}
families = pytest.mark.parametrize("kind", ["retention", "llama-like", "long"])


def make(kind: str, **windows: int):
    return make_long(**windows) if kind == "long" else make_model(kind)


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(2))


@families
@torch.no_grad()
def test_auto_model_reads_the_folder_of_a_causal_language_model_and_its_own(kind: str, tmp_path: Path) -> None:
    model, ids = make(kind), draw_ids(2, 24)
    expected = model.base_model(ids, use_cache=False).last_hidden_state
    model.save_pretrained(tmp_path / "causal")
    base, info = AutoModel.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert type(base) is (LongLlamaModel if kind == "long" else YocoModel)
    assert not any(info.values())
    assert base.base_model is base
    assert torch.equal(base(ids, use_cache=False).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(ids, use_cache=False)[0], expected)
    if model.config.tie_word_embeddings:  # then the base model holds the head's weights
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(whole(ids).logits, model(ids).logits)
    else:
        with pytest.raises(ValueError, match=r"has 1 missing tensors: (output_projection|lm_head)\.weight"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@torch.no_grad()
def test_a_base_model_has_a_cache(tmp_path: Path) -> None:
    for kind in ("retention", "long"):
        model, ids = make(kind, last_context_length=16), draw_ids(2, 12)
        model.save_pretrained(tmp_path / kind)
        base = AutoModel.from_pretrained(tmp_path / kind)
        cache = base(ids[:, :5], use_cache=True).past_key_values
        found = base(ids[:, 5:], past_key_values=cache).last_hidden_state
        torch.testing.assert_close(found, base(ids, use_cache=False).last_hidden_state[:, 5:], **close)
        assert model.new_cache(2).made_for == cache.made_for


@families
@torch.no_grad()
def test_positions_to_keep(kind: str) -> None:
    model, ids = make(kind), draw_ids(2, 24)
    everything = model.base_model(ids, use_cache=False).last_hidden_state
    mask = draw_ids(2, 24) % 3 == 0
    for keep, expected in (
        (3, everything[:, -3:]),
        (torch.tensor([20, 1]), everything[:, [20, 1]]),
        (mask, everything[mask]),
    ):
        found = model.base_model(ids, use_cache=False, positions_to_keep=keep).last_hidden_state
        torch.testing.assert_close(found, expected, **close)


# -- hidden states of all layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "long"])
@torch.no_grad()
def test_hidden_states_are_those_between_the_layers(kind: str) -> None:
    model, ids = make(kind, last_context_length=16), draw_ids(2, 12)  # in one window
    stack, seen = model._stack(), []
    hooks = [stack[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))]
    hooks += [
        module.register_forward_hook(lambda module, given, output: seen.append(output))
        for module in (*stack[:-2], stack[-1])
    ]
    logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == model.config.num_hidden_layers + 1
    for keep in (None, 1):
        found = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=keep)
        assert len(found.hidden_states) == len(seen)
        for x, expected in zip(found.hidden_states, seen, strict=True):
            torch.testing.assert_close(x, expected, **close)
        torch.testing.assert_close(found.logits, logits[:, -1:] if keep else logits, **close)
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(found.hidden_states[-1]), logits, **close)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@families
def test_hidden_states_of_padded_and_packed_rows_and_their_gradients(kind: str) -> None:
    model, ids = make(kind, max_position_embeddings=32), draw_ids(2, 20)
    alone = [model(row, use_cache=False, output_hidden_states=True).hidden_states for row in (ids[:1, 7:], ids[1:])]
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    for x, first, second in zip(padded.hidden_states, *alone, strict=True):
        torch.testing.assert_close(x[:1, 7:], first, **close)
        torch.testing.assert_close(x[1:], second, **close)
        assert not x[0, :7].any()
    row, borders = torch.cat((ids[:1, 7:], ids[1:]), 1), torch.tensor([0, 13, 33])
    packed = model(row, cu_seqlens=borders, use_cache=False, output_hidden_states=True, labels=row)
    for x, *both in zip(packed.hidden_states, *alone, strict=True):
        torch.testing.assert_close(x, torch.cat(both, 1), **close)
    plain = model(row, cu_seqlens=borders, use_cache=False, labels=row)
    torch.testing.assert_close(packed.loss, plain.loss, **close)
    assert all(x.requires_grad for x in packed.hidden_states)


@torch.no_grad()
def test_hidden_states_are_transformers_of_the_same_llama(tmp_path: Path) -> None:
    """In windows, without memory: those of each window alone; within one window those of the Llama."""
    model, ids = make_long(mem_layers=[], max_position_embeddings=64), draw_ids(2, 40)
    model.save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    expected = llama(ids, use_cache=False, output_hidden_states=True).hidden_states
    found = model(ids, use_cache=False, output_hidden_states=True, last_context_length=64).hidden_states
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
