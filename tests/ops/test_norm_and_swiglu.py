"""The small ops against their formulas."""

from __future__ import annotations

import pytest
import torch

from oncelm.ops import rms_norm, swiglu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(dtype: torch.dtype, weighted: bool) -> None:
    x = (torch.randn(3, 5, 16, dtype=torch.float64) * 30).to(dtype)
    weight = torch.randn(16, dtype=dtype) if weighted else None
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if weight is not None:
        exact = exact * weight.double()
    got = rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    # at most twice the error of rounding the exact result
    assert (got.double() - exact).norm() <= 2 * (exact.to(dtype).double() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("gradients", [True, False])
def test_swiglu(gradients: bool) -> None:
    x, gate = torch.randn(2, 7, 8, dtype=torch.float64).unbind()
    before = x.clone(), gate.clone()
    with torch.set_grad_enabled(gradients):
        x, gate = x.requires_grad_(gradients), gate.requires_grad_(gradients)
        out = swiglu(x, gate)
    torch.testing.assert_close(out, x * torch.sigmoid(x) * gate)
    assert torch.equal(x, before[0])
    assert torch.equal(gate, before[1])
    if gradients:
        assert torch.autograd.gradcheck(swiglu, (x, gate))
