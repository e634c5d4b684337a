"""The fused linear kernels of decoding against the same in plain PyTorch: in the interpreter, or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from oncelm.ops import apply_rope, rms_norm, rope_frequencies, rope_rotation, swiglu

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 for the interpreter", allow_module_level=True)

from oncelm.ops.decode_linear import MOST_ROWS, linear_add, norm_linears, norm_swiglu  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 3, 5] if INTERPRETED else [1, 2, 3, 4, 5, 8, MOST_ROWS]
EPS = 1e-5


def normal(*shape, dtype, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def close(found, expected, dtype):
    """Within twice the error of the same computation by PyTorch in this dtype, or float32's rounding."""
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert found.shape == expected.shape
    assert error < limit, error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_projections_with_rope_and_decay(M, pairing, dtype):
    K, H, D = 200, 3, 16
    x, norm_weight = normal(M, K, dtype=dtype), normal(K, dtype=dtype)
    sizes = (H * D, H * D, 40, 3)
    weights = [normal(n, K, dtype=dtype, seed=i) * K**-0.5 for i, n in enumerate(sizes)]
    rotation = rope_rotation(torch.arange(7, 7 + M), rope_frequencies(D, 1e4, "standard")).to(DEVICE)
    found = norm_linears(
        x, norm_weight, EPS, weights, ["rope", "rope", "plain", "decay"],
        rotation=rotation, pairing=pairing, decay_scale=1 / 16,
    )  # fmt: skip
    h = rms_norm(x.double(), norm_weight.double(), EPS)
    q, k, v, gate = (h @ weight.double().T for weight in weights)
    heads = [apply_rope(y.unflatten(-1, (H, D))[None], rotation[None], pairing)[0].flatten(1) for y in (q, k)]
    assert found[3].dtype == torch.float32
    for y, expected in zip(found, [*heads, v, F.logsigmoid(gate) / 16], strict=True):
        close(y, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", ROWS)
def test_added_projection_with_and_without_a_gate(M, dtype):
    H, D, n = 5, 32, 50
    x, gate, residual = (normal(M, size, dtype=dtype, seed=i) for i, size in enumerate((H * D, H * D, n)))
    weight = normal(n, H * D, dtype=dtype) * (H * D) ** -0.5
    close(linear_add(x, weight, residual), residual.double() + x.double() @ weight.double().T, dtype)
    heads = rms_norm(x.double().unflatten(-1, (H, D)), None, EPS).flatten(1)
    expected = residual.double() + swiglu(gate.double(), heads) @ weight.double().T
    close(linear_add(x, weight, residual, gate=gate, head_dim=D, eps=EPS), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", ROWS)
def test_feed_forward(M, dtype):
    K, n = 72, 90
    x, norm_weight = normal(M, K, dtype=dtype), normal(K, dtype=dtype)
    weight, gate = (normal(n, K, dtype=dtype, seed=i) * K**-0.5 for i in (1, 2))
    h = rms_norm(x.double(), norm_weight.double(), EPS)
    expected = swiglu(h @ weight.double().T, h @ gate.double().T)
    close(norm_swiglu(x, norm_weight, EPS, weight, gate), expected, dtype)


def apart(x):
    """The same numbers with gaps between them."""
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


def test_inputs_and_weights_that_lie_apart():
    K, H, D, n = 64, 2, 32, 50
    x, norm_weight, residual = (normal(*shape, dtype=torch.float32) for shape in ((3, K), (K,), (3, n)))
    weight, other = (normal(n, K, dtype=torch.float32, seed=i) for i in (1, 2))
    rotation = rope_rotation(torch.arange(3), rope_frequencies(D, 1e4, "standard")).to(DEVICE)
    rotated = normal(H * D, K, dtype=torch.float32)
    for lie in (apart, lambda x: x.T.contiguous().T if x.dim() == 2 else x):
        results = []
        for x_, norm_, weight_, other_, residual_, rotated_, rotation_ in (
            (x, norm_weight, weight, other, residual, rotated, rotation),
            (*map(lie, (x, norm_weight, weight, other, residual, rotated)), apart(rotation)),
        ):
            results.append([
                *norm_linears(x_, norm_, EPS, [rotated_, weight_], ["rope", "plain"], rotation=rotation_),
                linear_add(x_, weight_, residual_, gate=x_, head_dim=D, eps=EPS),
                norm_swiglu(x_, norm_, EPS, weight_, other_),
            ])  # fmt: skip
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
