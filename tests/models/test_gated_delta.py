"""The gated-delta mixer beside its formula written out, its start and its limits (ladder: test_equality_ladder.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oncelm import YocoConfig, YocoForCausalLM
from oncelm.cache import Batch
from oncelm.models.yoco.mixers import find_mixer
from oncelm.ops import gated_delta
from tests.models.small import VOCAB, make_model


def written_out(mixer: torch.nn.Module, h: torch.Tensor) -> torch.Tensor:
    """What flash-linear-attention's layer computes, with torch's convolution and the rule token by token."""
    W, D = mixer.conv_weight.shape[-1], mixer.head_dim

    def convolved(projection: torch.nn.Linear, weight: torch.Tensor) -> torch.Tensor:
        x = F.pad(projection(h).mT, (W - 1, 0))
        return F.silu(F.conv1d(x, weight, groups=len(weight))).mT.unflatten(-1, (-1, D))

    projections = mixer.q_proj, mixer.k_proj, mixer.v_proj
    q, k, v = map(convolved, projections, mixer.conv_weight.chunk(3))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    g = -mixer.A_log.exp() * F.softplus(mixer.a_proj(h) + mixer.dt_bias)
    o, _ = gated_delta(q, k, v, g, mixer.b_proj(h).sigmoid(), backend="naive")
    o = o * (o.square().mean(-1, keepdim=True) + mixer.head_norm.eps).rsqrt() * mixer.head_norm.weight
    return mixer.out_proj(o.flatten(2) * F.silu(mixer.g_proj(h)))


def test_it_is_the_layer_of_flash_linear_attention() -> None:
    model = make_model("delta", conv_size=3).double()
    mixer = model.self_decoder.layers[0].mixer
    h = torch.randn(2, 70, model.config.hidden_size, dtype=torch.float64)
    past = type(mixer).fresh_past(model.config)
    found = mixer(h, torch.empty(0), past, Batch.dense((0, 0), 70, h.device))
    torch.testing.assert_close(found, written_out(mixer, h), rtol=1e-9, atol=1e-10)


def test_every_weight_learns() -> None:
    model = make_model("delta").train()
    ids = torch.randint(VOCAB, (2, 20))
    model(ids, labels=ids).loss.backward()
    for name, weight in model.self_decoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_it_starts_with_the_decays_of_flash_linear_attention() -> None:
    config = YocoConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=16, self_decoder="gated_delta", num_self_heads=64,
        num_self_decoder_layers=1, num_cross_decoder_layers=0, num_attention_heads=64,
    )  # fmt: skip
    mixer = YocoForCausalLM(config).self_decoder.layers[0].mixer
    decays, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0 < decays.min() < 4
    assert 12 < decays.max() < 16.01
    assert 0.00099 < steps.min() < 0.01 < steps.max() < 0.101
    assert 0.45 < mixer.conv_weight.abs().max() <= 0.5
    assert (mixer.head_norm.weight == 1).all()


@pytest.mark.parametrize("undone", [1, 3, 6])
def test_tokens_taken_back_leave_state_and_tail_as_before(undone: int) -> None:
    model, ids = make_model("delta"), torch.randint(VOCAB, (2, 12))
    cache, straight = model.new_cache(2, 20), model.new_cache(2, 20)
    model.prefill(ids[:, : 12 - undone], straight)
    cache.record()
    for piece in ids.split(4, dim=1):
        model(piece, past_key_values=cache)
    cache.crop(undone)
    for name, tensor in straight._in_use(straight.num_tokens).items():
        torch.testing.assert_close(cache._in_use(cache.num_tokens)[name], tensor)


def test_what_it_cannot_is_said() -> None:
    config = make_model("delta").config
    mixer = find_mixer("gated_delta")
    with pytest.raises(ValueError, match="GatedDelta does not know how to split its weights over ranks"):
        mixer.tensor_plan(config, 2)
    with pytest.raises(ValueError, match="GatedDelta does not know how to mix a sequence that is split over ranks"):
        mixer.chunk_past(config)
    with pytest.raises(ValueError, match="one key/value head a query head: leave num_self_key_value_heads out"):
        make_model("delta", num_self_key_value_heads=1)
    with pytest.raises(ValueError, match="conv_size"):
        make_model("delta", conv_size=0)
