"""Mixers: each beside another that must give the same, the registry, and what a class may take for granted."""

from __future__ import annotations

import re

import pytest
import torch

from oncelm import YocoConfig, YocoForCausalLM
from oncelm.models.yoco.mixers import Mixer, find_mixer, mixer_names, register_mixer
from oncelm.models.yoco.mixers.gated_retention import GatedRetention
from oncelm.models.yoco.mixers.registry import MIXERS
from oncelm.models.yoco.mixers.sliding_window import SlidingWindowAttention
from tests.models.small import VOCAB, make_model


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))


def test_full_attention_is_a_window_as_long_as_the_text() -> None:
    full, ids = make_model("full"), draw_ids(2, 20)
    window = make_model("full", self_decoder="sliding_window", window_size=20)
    window.load_state_dict(full.state_dict())
    torch.testing.assert_close(full(ids).logits, window(ids).logits, rtol=1e-4, atol=1e-4)


def test_full_attention_in_eight_bits_decodes_near_the_exact() -> None:
    model, ids = make_model("full"), draw_ids(2, 20)
    results = []
    for dtype in (torch.float32, torch.int8):
        cache = model.new_cache(2, 20, dtype=dtype)
        model.prefill(ids[:, :15], cache)
        results.append(model(ids[:, 15:], past_key_values=cache).logits)
    assert cache.tensors()["layers.0.k"].dtype == torch.int8
    exact, rounded = results
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("number", "name"), [*enumerate(["gated_retention", "sliding_window", "full_attention"])])
def test_a_layer_of_a_hybrid_is_that_of_a_uniform_model(number: int, name: str) -> None:
    hybrid, uniform = make_model("hybrid"), make_model("hybrid", layer_types=[name] * 3 + ["cross_attention"])
    layers = [model.self_decoder.layers[number] for model in (hybrid, uniform)]
    assert [type(layer.mixer) for layer in layers] == [find_mixer(name)] * 2
    layers[0].load_state_dict(layers[1].state_dict())
    inputs, outputs = [], []
    for layer in layers:  # the uniform model's layer is given what the hybrid's was
        layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]) or (inputs[0], *given[1:]))
        layer.register_forward_hook(lambda module, given, output: outputs.append(output))
    for model in (hybrid, uniform):
        model(draw_ids(1, 12), use_cache=False)
    torch.testing.assert_close(*outputs)


def test_names_that_are_taken_or_mean_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oncelm.models.yoco.mixers.registry.MIXERS", dict(MIXERS))
    for name in ("gated_retention", "cross_attention"):
        with pytest.raises(ValueError, match=f"there is a mixer {name!r} already; register Mine under another name"):
            register_mixer(name)(type("Mine", (Mixer,), {}))
    with pytest.raises(ValueError, match="transformers reads it as 'linear_attention'"):
        register_mixer("mamba")(type("Mine", (Mixer,), {}))
    with pytest.raises(ValueError, match="it must be one word"):
        register_mixer("my mixer")(type("Mine", (Mixer,), {}))
    register_mixer("mine")(type("Mine", (Mixer,), {}))
    register_mixer("mine")(type("Mine", (Mixer,), {}))  # a notebook's cell again
    assert mixer_names()[-1] == "mine"
    with pytest.raises(TypeError, match="is not a subclass of oncelm"):
        register_mixer("linear")(torch.nn.Linear)
    with pytest.raises(TypeError, match=r'write @register_mixer\("name"\)'):
        register_mixer(type("Mine", (Mixer,), {}))


def test_kernels_take_nothing_for_granted_of_a_subclass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a projection more must never lose it to a kernel that knows the others."""

    class More(GatedRetention):
        pass

    assert GatedRetention.projections
    assert More.projections is None
    assert More.float8_layers == ()
    assert not More.in_cuda_graphs


def test_what_a_mixer_does_not_say_is_refused() -> None:
    class Mine(Mixer):
        pass

    config = YocoConfig()
    for ask in (lambda: Mine.chunk_past(config), lambda: Mine.tensor_plan(config, 2)):
        with pytest.raises(ValueError, match="Mine does not know how to"):
            ask()
    assert Mine.work(config) is None
    for ask, what in (
        (lambda: Mine().before(torch.ones(1), torch.ones(1)), "before(self, h, rotation)"),
        (lambda: Mine().mix((), None, None), "mix(self, inputs, past, batch)"),
        (lambda: Mine().after(torch.ones(1), None), "after(self, o, gate)"),
        (lambda: Mine.states(config), "a classmethod states(cls, config)"),
    ):
        with pytest.raises(NotImplementedError, match=re.escape(f"the mixer Mine has to define {what}")):
            ask()


def test_hybrids_may_group_the_heads_of_their_windows() -> None:
    """Gated retention by itself has one key/value head a query head; beside a window it leaves the key to that."""
    types = ["gated_retention", "sliding_window", "cross_attention"]
    model = YocoForCausalLM(
        YocoConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, layer_types=types, num_self_heads=2,
            num_self_key_value_heads=1, num_attention_heads=4,
        )
    )  # fmt: skip
    assert isinstance(model.self_decoder.layers[1].mixer, SlidingWindowAttention)
    assert model.self_decoder.layers[1].mixer.k_proj.out_features == 16
    assert model(draw_ids(1, 5)).logits.isfinite().all()


def test_a_cache_of_other_layers_is_refused() -> None:
    model = make_model("hybrid")
    types = ["sliding_window", "gated_retention", "full_attention", "cross_attention"]
    cache = make_model("hybrid", layer_types=types).new_cache(1, 8)
    for other in (cache, make_model("full", num_cross_decoder_layers=1, num_self_decoder_layers=3).new_cache(1, 8)):
        with pytest.raises(ValueError, match="made for a model with layer_types="):
            model(draw_ids(1, 3), past_key_values=other)
