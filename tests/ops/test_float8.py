"""Products in float8 against exact ones. (Torch computes them on a CPU too, slowly.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops.float8 import LARGEST, check_float8, linear_float8, round_rows


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), magnitude=st.floats(-20, 20), seed=st.integers(0, 99))
def test_rounding_is_within_half_a_step_of_three_bits(rows: int, magnitude: float, seed: int) -> None:
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    rounded = round_rows(x)
    assert rounded.values.float().abs().amax(-1).tolist() == [LARGEST] * rows
    smallest = rounded.scales * 2.0**-9  # of float8, times the scale
    assert ((rounded.values.float() * rounded.scales - x).abs() <= x.abs() / 16 + smallest).all()


def test_a_row_of_zeros_stays_zero() -> None:
    rounded = round_rows(torch.zeros(2, 16))
    assert not rounded.values.float().any()
    assert rounded.scales.isfinite().all()


def test_the_product_is_that_of_the_rounded_operands() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    a, b = round_rows(x), round_rows(weight)
    exact = (a.values.float() * a.scales) @ (b.values.float() * b.scales).T
    got = linear_float8(a, b, torch.bfloat16)
    assert got.shape == (2, 3, 48)
    torch.testing.assert_close(got.float(), exact, rtol=1e-2, atol=1e-2)
    assert (got.float() - x.float() @ weight.float().T).norm() < 0.06 * exact.norm()


def test_a_device_that_cannot_is_refused() -> None:
    with pytest.raises(ValueError, match="need an NVIDIA GPU"):
        check_float8(torch.device("cpu"), torch.bfloat16)


def test_only_bfloat16_comes_out(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_float8(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ValueError, match=r"need a model in bfloat16; this one is in torch\.float16"):
        check_float8(torch.device("cuda"), torch.float16)
