"""The fused loss equals cross-entropy of the whole logits, gradients included, and never holds them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from oncelm.ops import linear_cross_entropy


def reference(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


@pytest.mark.parametrize("M", [0, 1, 37])
def test_value_and_gradients(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["oncelm.ops.linear_cross_entropy"], "BLOCK_ELEMENTS", 100)  # several blocks
    weight = torch.randn(11, 6, dtype=torch.float64)
    hidden = torch.randn(M, 6, dtype=torch.float64)
    targets = torch.randint(0, 11, (M,))
    results = []
    for function in (linear_cross_entropy, reference):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, targets)
        (3 * loss).backward()
        results.append((loss, h.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_no_gradient_is_asked_for() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    targets = torch.randint(0, 7, (5,))
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), reference(hidden, weight, targets))


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight = torch.randn(5, 64, requires_grad=True), torch.randn(7, 64, requires_grad=True)
    targets = torch.randint(0, 7, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    torch.testing.assert_close(
        loss, reference(hidden.bfloat16().float(), weight.bfloat16().float(), targets), rtol=0.02, atol=0.1
    )


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(torch.randn(5, 4), torch.randn(7, 3), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets must be \[M\]"):
        linear_cross_entropy(torch.randn(5, 4), torch.randn(7, 4), torch.zeros(4, dtype=torch.long))
