"""The poison of conftest.py reaches every way to ask for memory, so that the other tests would see it."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_no_new_float_is_a_number(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, dtype=dtype)
    made = (
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(x),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        x.new_empty(2, 3),
        x.new_empty_strided((2, 3), (1, 2)),
    )
    for new in made:
        assert new.dtype == dtype
        assert new.float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_no_new_integer_is_an_index(dtype: torch.dtype) -> None:
    assert (torch.empty(3, dtype=dtype).long() >= 122).all()
    assert (torch.zeros(3).new_empty(3, dtype=dtype).long() >= 122).all()


def test_shapes_alone_are_left_alone() -> None:
    assert torch.empty(1 << 40, device="meta").shape == (1 << 40,)
    assert torch.empty(2, requires_grad=True).requires_grad
