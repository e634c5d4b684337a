"""One token a sequence with positions on the device: the same logits and the same cache as the ordinary path.

Without a GPU nothing is recorded, but the same pasts are asked, and with Triton's interpreter the same fused kernels.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from oncelm import YocoForCausalLM
from oncelm.models import step_graph
from oncelm.models.yoco.execution import side_by_side
from oncelm.models.yoco.model import PLAIN
from tests.models.small import KINDS, VOCAB, make_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
close = {"rtol": 1e-4, "atol": 1e-4}

fused = pytest.param(
    "fused", marks=pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs Triton's device")
)


@pytest.fixture(params=["plain", "side by side", fused])
def parts(request, monkeypatch):
    """The token-wise parts that steps use."""
    if request.param == "plain":
        chosen = PLAIN
    elif request.param == "side by side":
        chosen = side_by_side(PLAIN)
    else:
        from oncelm.models.yoco.fused import FUSED as chosen
    monkeypatch.setattr(YocoForCausalLM, "token_parts", lambda model, x: chosen if x.shape[1] == 1 else PLAIN)
    return request.param


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def make(kind: str):
    return make_model(kind, hidden_size=64, num_self_heads=4, num_attention_heads=4).to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_a_full_forward(kind, parts):
    if INTERPRETED and parts == "fused" and kind not in ("retention", "window", "llama-like"):
        pytest.skip("the interpreter is slow; other kinds have the same layers")
    model, ids = make(kind), draw_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    cache = model.new_cache(2, 12)
    model.prefill(ids[:, :9], cache)
    for t in range(9, 12):
        torch.testing.assert_close(model.step(ids[:, t : t + 1], cache), expected[:, t], **close)
    assert cache.lengths == (12, 12)
    assert cache.columns == 12


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_other_tokens_than_one_a_sequence_are_refused(shape):
    model = make("retention")
    cache = model.new_cache(2, 12)
    with pytest.raises(ValueError, match="a token a sequence, \\[2, 1\\], got"):
        model.step(draw_ids(*shape), cache)
    model.step(draw_ids(2, 1), cache)  # nothing has changed


@pytest.mark.parametrize("kind", ["retention", "window"])
def test_sequences_of_different_lengths(kind, parts):
    model, ids = make(kind), draw_ids(3, 12)
    cache = model.new_cache(3, 16)
    mask = torch.ones(3, 8, dtype=torch.long, device=DEVICE)
    mask[1, :5], mask[2, 6:] = 0, 0
    model.prefill(ids[:, :8], cache, attention_mask=mask)
    for t in range(8, 12):
        logits = model.step(ids[:, t : t + 1], cache)
    for row in range(3):
        alone = torch.cat((ids[row, :8][mask[row].bool()], ids[row, 8:]))[None]
        torch.testing.assert_close(logits[row], model(alone, use_cache=False).logits[0, -1], **close)


def test_steps_go_on_after_a_prefill_a_return_and_a_reset(parts):
    model, ids = make("retention"), draw_ids(1, 20)
    expected = model(ids, use_cache=False).logits
    cache = model.new_cache(1, 20)
    model.prefill(ids[:, :4], cache)
    point = cache.snapshot(shared=False)
    for t in range(4, 7):
        model.step(ids[:, t : t + 1], cache)
    cache.restore(point)
    for t in range(4, 7):
        logits = model.step(ids[:, t : t + 1], cache)
    torch.testing.assert_close(logits, expected[:, 6], **close)
    model.prefill(ids[:, 7:15], cache)
    torch.testing.assert_close(model.step(ids[:, 15:16], cache), expected[:, 15], **close)
    cache.reset()
    for t in range(2):
        logits = model.step(ids[:, t : t + 1], cache)
    torch.testing.assert_close(logits, expected[:, 1], **close)


def test_a_growing_cache_and_other_rows(parts):
    model, ids = make("window"), draw_ids(2, 300)
    expected = model(ids, use_cache=False).logits
    cache = model.new_cache(2)
    model.prefill(ids[:, :254], cache)
    for t in range(254, 258):  # the first capacity is 256
        torch.testing.assert_close(model.step(ids[:, t : t + 1], cache), expected[:, t], **close)
    cache.select([1])
    torch.testing.assert_close(model.step(ids[1:, 258:259], cache), expected[1:, 258], **close)


def test_a_full_cache_is_refused_before_anything_changes(parts):
    model, ids = make("retention"), draw_ids(1, 5)
    cache = model.new_cache(1, 4)
    model.prefill(ids[:, :4], cache)
    state = cache.layers[0].state.clone()
    with pytest.raises(ValueError, match="at most 4 tokens"):
        model.step(ids[:, 4:], cache)
    assert torch.equal(cache.layers[0].state, state)
    assert cache.lengths == (4,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_forward_replays_a_graph(kind):
    model, ids = make(kind), draw_ids(2, 40)
    expected = model(ids, use_cache=False).logits
    cache = model.new_cache(2, 41)
    model.prefill(ids[:, :20], cache)
    for t in range(20, 40):
        logits = model(ids[:, t : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=1e-3, atol=1e-3)
    assert model._graph(cache).graph is not None


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs Triton's device")
def test_a_layer_with_an_adapter_is_computed_as_it_is():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    from oncelm.models.yoco.fused import FUSED

    model, ids = make("retention"), draw_ids(1, 1)
    layer = model.self_decoder.layers[0]
    x = model.embed(ids)
    rotation = torch.zeros(1, 1, layer.mixer.head_dim // 2, 2, device=DEVICE)
    for name in ("q_proj", "out_proj"):
        plain = getattr(layer.mixer, name)
        own = Doubled(plain.in_features, plain.out_features, bias=False, device=DEVICE)
        own.weight = plain.weight
        setattr(layer.mixer, name, own)
    with torch.no_grad():
        inputs, gate = FUSED.before(layer, x, rotation)
        expected, expected_gate = PLAIN.before(layer, x, rotation)
        torch.testing.assert_close(inputs, expected)
        o = torch.randn_like(inputs[2])
        torch.testing.assert_close(FUSED.after(layer, x, o, gate), PLAIN.after(layer, x, o, expected_gate))


def test_a_step_with_another_models_cache_is_refused():
    model, other = make("retention"), make("window")
    with pytest.raises(ValueError, match="the cache was made for a model with"):
        model.step(draw_ids(2, 1), other.new_cache(2, 12))


class OnGpu(torch.Tensor):
    """Ids that say they are on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("kind", ["retention", "hybrid", "interleaved"])
def test_a_graph_follows_cache_and_weights(kind, monkeypatch):
    """With a graph whose replay runs what would have been recorded, on the same tensors."""
    recorded = []

    def record(graph: step_graph.StepGraph) -> None:
        graph.graph = SimpleNamespace(replay=lambda: recorded.append(graph) or graph._step())

    monkeypatch.setattr(step_graph.StepGraph, "_record", record)
    model, ids = make_model(kind), draw_ids(2, 14)

    def check(cache, rows) -> None:
        expected = model(ids[rows], use_cache=False).logits
        for t in range(cache.num_tokens, 14):
            found = model(ids[rows, t : t + 1].as_subclass(OnGpu), past_key_values=cache).logits
            torch.testing.assert_close(found[:, 0].as_subclass(torch.Tensor), expected[:, t], **close)

    with torch.no_grad():
        for max_tokens in (14, None):  # of one size; growing, so that it moves
            cache = model.new_cache(2, max_tokens)
            model.prefill(ids[:, :3], cache)
            start = cache.snapshot()
            check(cache, [0, 1])
            cache.restore(start)
            check(cache, [0, 1])
            cache.restore(start)
            cache.select([1, 0, 1])
            check(cache, [1, 0, 1])
        assert len({*recorded}) > 2
        before = len(recorded)
        for weight in model.parameters():
            weight.data = weight.data * 1.1
        cache.reset()
        model.prefill(ids[[1, 0, 1], :3], cache)
        check(cache, [1, 0, 1])
    assert len(recorded) > before
