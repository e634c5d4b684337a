"""Layers with one-pass rounding compute what plain ones do in float8, compiled too; needs a GPU or the interpreter."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from oncelm import YocoForCausalLM
from oncelm.models.yoco import execution
from oncelm.models.yoco.execution import compiled_parts
from oncelm.models.yoco.model import PLAIN
from tests.models.small import VOCAB, make_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs Triton's device"),
    pytest.mark.usefixtures("exact_rounding"),
]


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def make(kind: str, monkeypatch: pytest.MonkeyPatch) -> YocoForCausalLM:
    monkeypatch.setattr(execution, "check_float8", lambda device, dtype: None)
    model = make_model(kind, num_self_key_value_heads=None).bfloat16()
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model.to(DEVICE)


@torch.no_grad()
def prefill(model: YocoForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model.prefill(ids, model.new_cache(*ids.shape), chunk_size=ids.shape[1]).float()


@pytest.mark.parametrize("compiling", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["retention", "window"])
def test_the_parts_are_as_near_to_exact_as_the_plain_ones(kind, compiling, monkeypatch) -> None:
    from oncelm.models.yoco.float8 import FLOAT8

    if compiling and DEVICE == "cpu" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    model, ids = make(kind, monkeypatch), draw_ids(1, 70)
    exact = prefill(model, ids)
    model.set_quantization("float8")
    monkeypatch.setattr(YocoForCausalLM, "token_parts", lambda model, x: PLAIN)
    plain = prefill(model, ids)
    calls = []

    def parts(model: YocoForCausalLM, x: torch.Tensor):
        calls.append(x.shape[1])
        if x.shape[1] == 1:
            return PLAIN
        return compiled_parts(FLOAT8, False) if compiling else FLOAT8

    monkeypatch.setattr(YocoForCausalLM, "token_parts", parts)
    torch._dynamo.reset()
    got = prefill(model, ids)
    assert 70 in calls
    assert 0 < (got - exact).norm() < 1.2 * (plain - exact).norm()
    assert (got - plain).norm() < (plain - exact).norm()


def test_a_layer_with_an_exact_product_is_plain(monkeypatch) -> None:
    from oncelm.models.yoco.float8 import FLOAT8

    model, ids = make("retention", monkeypatch).set_quantization("float8"), draw_ids(1, 70)
    for layer in model.self_decoder.layers:
        layer.ffn.fc1.rounded = None  # as an adapter's base layer
    results = []
    for chosen in (PLAIN, FLOAT8):
        monkeypatch.setattr(YocoForCausalLM, "token_parts", lambda model, x: chosen if x.shape[1] > 1 else PLAIN)  # noqa: B023
        results.append(prefill(model, ids))
    assert torch.equal(*results)


def test_a_hook_is_called_in_float8_too(monkeypatch) -> None:
    from oncelm.models.yoco.float8 import FLOAT8

    model, ids = make("retention", monkeypatch).set_quantization("float8"), draw_ids(1, 70)
    monkeypatch.setattr(YocoForCausalLM, "token_parts", lambda model, x: FLOAT8 if x.shape[1] > 1 else PLAIN)
    called = []
    for name in ("mixer.q_proj", "ffn.fc2"):
        layer = model.self_decoder.layers[0].get_submodule(name)
        layer.register_forward_hook(lambda layer, inputs, output: called.append(layer))
    prefill(model, ids)
    assert len(called) == 2
