"""Crossbatch attention: the official outputs and gradients, and every backend against the definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

import oncelm
from oncelm.ops.attention import partial
from oncelm.ops.crossbatch import earlier_contexts, flash, flex
from oncelm.ops.crossbatch.blocks import Crossbatch

OPTIONS = {"cross_batch_range": 3, "cross_batch_stepping": True, "dataset_packing": 2, "rope_theta": 10000.0}


def inputs(B: int, T: int, H: int, H_kv: int, D: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(B + T + H)
    shapes = ((B, T, H, D), (B, T, H_kv, D), (B, T, H_kv, D))
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def outputs(tensors: list[torch.Tensor], cotangent: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """The output and the gradients."""
    out = oncelm.ops.crossbatch_attention(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, cotangent)]


@pytest.mark.parametrize("backend", ["auto", "naive"])
@pytest.mark.parametrize("name", ["d1", "d3_pack2_step", "d6_pack4_step"])
def test_official_outputs_and_gradients(name: str, backend: str, golden: Path) -> None:
    options = json.loads((golden / "fot" / f"{name}.json").read_text())
    del options["layout"]
    recorded = {key: torch.from_numpy(value) for key, value in np.load(golden / "fot" / f"{name}.npz").items()}
    tensors = [recorded[key].requires_grad_() for key in "qkv"]
    found = outputs(tensors, recorded["dout"], backend=backend, **options)
    for key, value in zip(("out", "dq", "dk", "dv"), found, strict=True):
        torch.testing.assert_close(
            value, recorded[key], rtol=1e-5, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@settings(deadline=None, max_examples=25)
@given(
    packing=st.integers(1, 4),
    documents=st.integers(1, 3),
    T=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    cross_batch_range=st.integers(1, 7),
    stepping=st.booleans(),
    theta=st.sampled_from([None, 100.0]),
    score_elements=st.sampled_from([1, 50, 1 << 24]),
)
def test_blocks_equal_the_definition(
    packing, documents, T, heads, cross_batch_range, stepping, theta, score_elements
) -> None:
    tensors = inputs(packing * documents, T, *heads, 4)
    options = {"cross_batch_range": cross_batch_range, "cross_batch_stepping": stepping}
    options |= {"dataset_packing": packing, "rope_theta": theta}
    cotangent = torch.randn(tensors[0].shape, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial, "SCORE_ELEMENTS", {"cpu": score_elements})
        found = outputs(tensors, cotangent, backend="blocks", **options)
    for value, expected in zip(found, outputs(tensors, cotangent, backend="naive", **options), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6), blocks=st.integers(1, 3))
def test_written_block_masks_are_what_asking_every_pair_gives(counts, blocks) -> None:
    T = blocks * flex.BLOCK
    written = flex._mask(tuple(counts), T, torch.device("cpu"))
    tokens = T * len(counts)
    asked = create_block_mask(written.mask_mod, None, None, tokens, 2 * tokens, device="cpu")
    assert torch.equal(written.to_dense(), asked.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(written, name), getattr(asked, name)), name


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_flash_rounds_equal_the_definition(heads, dtype) -> None:
    """torch's form for CPUs, which has the kernel's interface: the error is at most twice that of plain PyTorch."""
    wide = inputs(8, 12, *heads, 16)
    cotangent = torch.randn(wide[0].shape, dtype=torch.float64)
    expected = outputs(wide, cotangent, backend="naive", **OPTIONS)
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]

    def rounds(q, k, first_k, v, counts, scale):
        return Crossbatch.apply(q, k, first_k, v, counts, scale, flash.Flash())

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = outputs(narrow, cotangent.to(dtype), backend="naive", **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oncelm.ops.crossbatch.implementation", lambda *_: rounds)
        found = outputs(narrow, cotangent.to(dtype), **OPTIONS)
    for value, simple, exact in zip(found, plain, expected, strict=True):
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (value, simple))
        assert error <= 2 * allowed + 1e-9


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_definition(monkeypatch) -> None:
    """On a CPU FlexAttention has no gradients, so there it is no backend."""
    tensors = inputs(4, 8, 4, 2, 16, torch.float32)
    with torch.no_grad():
        expected = oncelm.ops.crossbatch_attention(*tensors, backend="naive", **OPTIONS)
        monkeypatch.setattr("oncelm.ops.crossbatch.implementation", lambda *_: flex.packed)
        found = oncelm.ops.crossbatch_attention(*tensors, **OPTIONS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [200, 256])
@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_half_precision_on_a_gpu(backend, T) -> None:
    """At most twice the error of the definition computed in bfloat16."""
    tensors = inputs(8, T, 4, 2, 64, torch.float32)
    cotangent = torch.randn(tensors[0].shape)
    expected = outputs(tensors, cotangent, backend="naive", **OPTIONS)
    narrow = [x.detach().cuda().bfloat16().requires_grad_() for x in tensors]
    cotangent = cotangent.cuda().bfloat16()
    found = outputs(narrow, cotangent, backend=backend, **OPTIONS)
    with torch.autocast("cuda", torch.bfloat16):
        plain = outputs(narrow, cotangent, backend="naive", **OPTIONS)
    for value, simple, exact in zip(found, plain, expected, strict=True):
        error, allowed = ((x.cpu().float() - exact).norm() / exact.norm() for x in (value, simple))
        assert error <= 2 * allowed


@pytest.mark.gpu
@pytest.mark.parametrize("T", [200, 256])
@pytest.mark.parametrize("backend", ["blocks", "flex"])
def test_on_a_gpu(backend, T) -> None:
    tensors = inputs(8, T, 4, 2, 64, torch.float32)
    cotangent = torch.randn(tensors[0].shape)
    expected = outputs(tensors, cotangent, backend="naive", **OPTIONS)
    on_gpu = [x.detach().cuda().requires_grad_() for x in tensors]
    for value, wanted in zip(outputs(on_gpu, cotangent.cuda(), backend=backend, **OPTIONS), expected, strict=True):
        torch.testing.assert_close(value.cpu(), wanted, rtol=2e-3, atol=2e-3)


def test_autocast_changes_only_what_comes_in() -> None:
    q, k, v = (x.detach() for x in inputs(4, 8, 4, 2, 16, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = oncelm.ops.crossbatch_attention(q, k, v, **OPTIONS)
    assert torch.equal(found, oncelm.ops.crossbatch_attention(q, k, v, **OPTIONS))


def test_memory_of_one_context_at_a_time(monkeypatch) -> None:
    """No tensor has more keys than one context has."""
    most = []
    original = partial.partial_attention

    def watched(q, k, v, **options):
        most.append(k.shape[1])
        return original(q, k, v, **options)

    monkeypatch.setattr("oncelm.ops.crossbatch.blocks.partial_attention", watched)
    oncelm.ops.crossbatch_attention(*inputs(8, 5, 2, 2, 4), **OPTIONS | {"dataset_packing": 4})
    assert set(most) == {5}
    assert len(most) == 4  # the local context, and three rounds


def test_the_papers_schedule() -> None:
    """(positives, negatives) of the rows of a document, once other documents stand before it."""
    counts = earlier_contexts(12, 3, True, 4)[4:8]
    mixed = [(min(i, count), count - min(i, count)) for i, count in enumerate(counts)]
    assert mixed == [(0, 0), (1, 1), (2, 1), (3, 0)]
    assert earlier_contexts(4, 2, False, 1) == (0, 1, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_batch_range": 0}, "cross_batch_range must be a whole number of at least 1, got 0"),
        ({"dataset_packing": 0}, "dataset_packing must be a whole number of at least 1, got 0"),
        ({"dataset_packing": 3}, "a batch of 4 is not divisible by dataset_packing 3"),
        ({"backend": "blokcs"}, "did you mean 'blocks'"),
    ],
)
def test_mistakes(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        oncelm.ops.crossbatch_attention(*inputs(4, 3, 2, 2, 4), **OPTIONS | change)
    with pytest.raises(ValueError, match="of the same B and T"):
        oncelm.ops.crossbatch_attention(*inputs(4, 3, 2, 2, 4)[:2], torch.ones(4, 2, 2, 4), **OPTIONS)
