"""Keys and values in 8 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops import dequantize_kv, quantize_kv

DTYPES = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)


@DTYPES
@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(-30, 30), D=st.sampled_from([1, 16, 100]), kept=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_errors_are_bounded(dtype: torch.dtype, size: int, D: int, kept: torch.dtype) -> None:
    x = (torch.randn(3, 2, D, generator=torch.Generator().manual_seed(size)) * 2.0**size).to(kept)
    values, scales = quantize_kv(x, dtype)
    assert values.dtype == dtype
    assert scales.dtype == torch.float32
    assert scales.shape == x.shape[:-1]
    error = (dequantize_kv(values, scales, torch.float64) - x.double()).abs()
    largest = x.double().abs().amax(-1, keepdim=True)
    if dtype == torch.int8:
        allowed = largest / 254
    else:  # half a unit of 3 bits; below 2^-6 of a scale half of 2^-9
        allowed = torch.maximum(x.double().abs() / 16, largest / 448 / 1024)
    assert (error <= allowed * (1 + 1e-5)).all()


@DTYPES
def test_zeros_and_the_smallest_numbers_stay_finite(dtype: torch.dtype) -> None:
    x = torch.stack([torch.zeros(4), torch.full((4,), 1e-44), torch.tensor([0.0, 3e38, -3e38, 1.0])])
    back = dequantize_kv(*quantize_kv(x, dtype), torch.float32)
    assert back[0].tolist() == [0.0] * 4
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back[2], x[2], rtol=0.01, atol=1e36)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.float8_e4m3fn, torch.int8; dtype torch.float16"):
        quantize_kv(torch.ones(2), torch.float16)
