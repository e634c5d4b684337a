"""A product added in place: the sum, in the same memory, rounded no more often than apart."""

from __future__ import annotations

import pytest
import torch

from oncelm.ops.add_product import add_product_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_the_sum_takes_its_place(dtype, contiguous, inference) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(inference):
        x, weight = torch.randn(2, 7, 64).to(dtype), torch.randn(48, 64).to(dtype)
        y = torch.randn(2, 7, 48).to(dtype)
        if not contiguous:
            y = y.transpose(0, 1).contiguous().transpose(0, 1)
        exact = y.double() + x.double() @ weight.double().T
        apart = y + x @ weight.T
        place = y.data_ptr()
        add_product_(y, x, weight)
        assert y.data_ptr() == place
        assert (y - exact).norm() <= 1.2 * (apart - exact).norm()


def test_the_op_keeps_the_rules_of_custom_ops() -> None:
    torch.library.opcheck(add_product_, (torch.randn(1, 3, 8), torch.randn(1, 3, 4), torch.randn(8, 4)))
