"""One-pass rounding kernels against the same in PyTorch, in float64."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from oncelm.ops.float8 import Float8Rows, round_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EPS = 1e-5

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs Triton's device"),
    pytest.mark.usefixtures("exact_rounding"),
]

shapes = pytest.mark.parametrize("shape", [(1, 5, 64), (2, 3, 48), (3, 3072), (2, 8192), (1, 16384)], ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(DEVICE, dtype)


def check_rows(rows: Float8Rows, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Each element within half a step of float8; the error no larger than that of rounding PyTorch's result."""
    assert rows.values.dtype == torch.float8_e4m3fn
    assert rows.values.shape == exact.shape
    assert rows.scales.shape == (*exact.shape[:-1], 1)
    got = rows.values.double() * rows.scales.double()
    torch.testing.assert_close(rows.scales.double(), exact.abs().amax(-1, keepdim=True) / 448, rtol=1e-5, atol=1e-14)
    assert ((got - exact).abs() <= exact.abs() / 15.9 + rows.scales * 2.0**-9.9).all()
    plain = round_rows(exact.to(dtype))
    error, plain_error = (got - exact).norm(), (plain.values.double() * plain.scales.double() - exact).norm()
    assert error <= 1.1 * plain_error + 1e-12


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.double(), x.shape[-1:], weight.double(), EPS)


@shapes
@dtypes
def test_norm(shape, dtype) -> None:
    from oncelm.ops.float8_triton import norm_rows

    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    normed, rows = norm_rows(x, weight, EPS)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), norm(x, weight), rtol=torch.finfo(dtype).eps * 4, atol=1e-6)
    check_rows(rows, norm(x, weight), dtype)


@shapes
@dtypes
def test_sum_and_norm(shape, dtype) -> None:
    from oncelm.ops.float8_triton import add_norm_rows

    x, y = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=2)
    weight = draw(shape[-1], dtype=dtype, seed=1)
    total, rows = add_norm_rows(x, y, weight, EPS)
    assert torch.equal(total, x + y)
    check_rows(rows, norm(x + y, weight), dtype)


@shapes
@dtypes
def test_swiglu(shape, dtype) -> None:
    from oncelm.ops.float8_triton import swiglu_rows

    x, gate = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    check_rows(swiglu_rows(x, gate), F.silu(x.double()) * gate.double(), dtype)


@dtypes
@pytest.mark.parametrize("shape", [(1, 5, 2, 32), (2, 3, 5, 24), (2, 24, 128), (1, 32, 256)], ids=str)
def test_heads_normalised_and_gated(shape, dtype) -> None:
    from oncelm.ops.float8_triton import gate_heads_rows

    o = draw(*shape, dtype=dtype)
    gate = draw(*shape, dtype=dtype, seed=1).flatten(-2)
    exact = F.silu(gate.double()) * F.rms_norm(o.double(), o.shape[-1:], None, EPS).flatten(-2)
    check_rows(gate_heads_rows(o, gate, EPS), exact, dtype)


def test_a_row_of_zeros_stays_zero() -> None:
    from oncelm.ops.float8_triton import norm_rows, swiglu_rows

    zeros = torch.zeros(2, 64, device=DEVICE)
    for rows in (swiglu_rows(zeros, zeros), norm_rows(zeros, zeros[0], EPS)[1]):
        assert not rows.values.float().any()
        assert rows.scales.isfinite().all()
