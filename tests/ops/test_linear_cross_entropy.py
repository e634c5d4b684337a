"""The fused loss equals cross-entropy of the whole logits, gradients included, and never holds them."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops import linear_cross_entropy
from oncelm.ops.dispatch import TABLE
from oncelm.ops.linear_cross_entropy import CHUNK_BYTES, chunk_rows, linear_cross_entropy_op

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
NAMES = ("loss", "hidden", "weight")


def reference(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def make(M: int, V: int, d: int, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(M + V)
    hidden, weight = (torch.randn(n, d, generator=generator, dtype=torch.float64).to(device, dtype) for n in (M, V))
    return hidden, weight, torch.randint(0, V, (M,), generator=generator).to(device)


def run(function, hidden, weight, targets, factor=3.0):
    """Loss and gradients of factor * loss, under NAMES."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, targets)
    (factor * loss).backward()
    return dict(zip(NAMES, (loss.detach(), hidden.grad, weight.grad), strict=True))


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 800)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("M", [0, 1, 37])
def test_value_and_gradients(M: int) -> None:
    inputs = make(M, 11, 6)
    found, expected = run(linear_cross_entropy, *inputs), run(reference, *inputs)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5000), vocabulary=st.sampled_from([1, 2, 97, 4096, 100288, 3 << 26]))
def test_chunks_are_sized_by_bytes(rows: int, vocabulary: int) -> None:
    for device in ("cpu", "cuda"):
        chunk = chunk_rows(rows, vocabulary, torch.bfloat16, torch.device(device))
        assert 1 <= chunk <= rows
        assert chunk == 1 or chunk * vocabulary * 2 <= CHUNK_BYTES[device]
        whole = rows if rows * vocabulary * 2 <= CHUNK_BYTES[device] // 2 else 1
        assert chunk >= min(whole, 256)


def test_no_gradient_is_asked_for() -> None:
    inputs = make(5, 7, 4, torch.float32)
    torch.testing.assert_close(linear_cross_entropy(*inputs), reference(*inputs))
    with torch.no_grad():
        loss = linear_cross_entropy(inputs[0].requires_grad_(), *inputs[1:])
    assert not loss.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_one_side_learns(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make(9, 7, 4)
    learning = (hidden if frozen == "weight" else weight).requires_grad_()
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), learning)
    torch.testing.assert_close(found, torch.autograd.grad(reference(hidden, weight, targets), learning))


def test_tied_weights_and_accumulated_gradients() -> None:
    """The weight is an embedding too, and the gradients of several batches add up."""
    _, weight, _ = make(9, 7, 4)
    gradients = []
    for function in (linear_cross_entropy, reference):
        tied = weight.clone().requires_grad_()
        for seed in range(3):
            ids = torch.randint(0, 7, (10,), generator=torch.Generator().manual_seed(seed))
            (function(F.embedding(ids[:-1], tied).tanh(), tied, ids[1:]) / 9).backward()
        gradients.append(tied.grad)
    torch.testing.assert_close(*gradients)


def test_a_second_backward_pass_raises_instead_of_scaling_twice() -> None:
    hidden, weight, targets = make(9, 7, 4)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        (3 * loss).backward()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype(weight_dtype: torch.dtype) -> None:
    hidden, weight, targets = make(5, 7, 64, torch.float32)
    hidden, weight = hidden.requires_grad_(), weight.to(weight_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert weight.grad.dtype == weight_dtype
    rounded = (hidden.detach().bfloat16().float(), weight.detach().bfloat16().float(), targets)
    expected = run(reference, *rounded, factor=1.0)
    for name, found in zip(NAMES, (loss, hidden.grad, weight.grad), strict=True):
        assert error(found, expected[name]) < 0.02, name


@pytest.mark.usefixtures("small_chunks")
def test_the_weights_gradient_is_summed_in_float32() -> None:
    """Many chunks of bfloat16 products: a bfloat16 sum would lose the small ones."""
    hidden, weight, targets = make(600, 11, 16, torch.bfloat16)
    exact = run(reference, hidden.double(), weight.double(), targets, factor=1.0)
    plain = run(lambda h, w, t: F.cross_entropy((h @ w.T).float(), t, reduction="sum"), hidden, weight, targets, 1.0)
    found = run(linear_cross_entropy, hidden, weight, targets, factor=1.0)
    for name in NAMES:
        assert error(found[name], exact[name]) <= max(2 * error(plain[name], exact[name]), 1e-6), name


def test_compiled_graph_is_whole() -> None:
    inputs = make(20, 7, 4)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found, expected = run(compiled, *inputs), run(reference, *inputs)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])


def test_operator_is_registered_properly() -> None:
    hidden, weight, targets = make(20, 7, 4)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), targets, torch.float64, True, True, "auto")
    torch.library.opcheck(
        linear_cross_entropy_op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_targets_of_any_integers() -> None:
    hidden, weight, targets = torch.randn(5, 4), torch.randn(7, 4), torch.randint(7, (5,))
    assert linear_cross_entropy(hidden, weight, targets.int()) == linear_cross_entropy(hidden, weight, targets)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(torch.randn(5, 4), torch.randn(7, 3), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets must be \[M\]"):
        linear_cross_entropy(torch.randn(5, 4), torch.randn(7, 4), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="targets must be"):
        linear_cross_entropy(torch.randn(5, 4), torch.randn(7, 4), torch.zeros(5))
    for outside in (-100, 7, 1 << 40):
        with pytest.raises(
            ValueError, match=rf"targets must lie in 0\.\.6, the vocabulary, got {outside}; drop ignored"
        ):
            linear_cross_entropy(torch.randn(2, 4), torch.randn(7, 4), torch.tensor([3, outside]))
    with pytest.raises(ValueError, match="unknown backend of linear_cross_entropy"):
        linear_cross_entropy(torch.randn(5, 4), torch.randn(7, 4), torch.zeros(5, dtype=torch.long), backend="nave")


@pytest.mark.parametrize("backend", ["naive", pytest.param("triton", marks=INTERPRETER)])
def test_a_target_outside_makes_the_loss_nan_and_is_never_read(backend: str) -> None:
    """On a GPU nobody waits to look at the targets first."""
    logits, losses = torch.randn(3, 5), torch.empty(3)
    to_gradient = importlib.import_module(f"oncelm.ops.linear_cross_entropy.{backend}").to_gradient
    to_gradient(logits, torch.tensor([-100, 2, 1 << 40]), losses, True)
    assert losses.isnan().tolist() == [True, False, True]
    assert logits.isfinite().all()


# ------------------------------------------------------------------------------------------------- the Triton kernel


@INTERPRETER
@pytest.mark.parametrize("V", [1, 7, 64, 100, 513])
@pytest.mark.parametrize("gradient", [True, False])
def test_kernel_in_the_interpreter(V: int, gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from oncelm.ops.linear_cross_entropy import naive, triton

    monkeypatch.setattr(triton, "LARGEST_BLOCK", 64)
    logits, targets = 20 * torch.randn(9, V), torch.randint(0, V, (9,))
    found, plain, exact = (
        {"logits": logits.to(dtype, copy=True), "losses": torch.empty(9, dtype=dtype)}
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    triton.to_gradient(found["logits"], targets, found["losses"], gradient)
    for expected in (plain, exact):
        naive.to_gradient(expected["logits"], targets, expected["losses"], gradient)
    for name in exact:
        assert error(found[name], exact[name]) <= max(2 * error(plain[name], exact[name]), 1e-6), name


@INTERPRETER
def test_kernel_reads_targets_that_lie_apart() -> None:
    from oncelm.ops.linear_cross_entropy import naive, triton

    logits, targets = torch.randn(3, 5), torch.tensor([4, 0, 1, 2, 3, 2])[::2]
    found, expected = torch.empty(2, 3)
    triton.to_gradient(logits.clone(), targets, found, False)
    naive.to_gradient(logits.clone(), targets, expected, False)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [row.backend for row in TABLE["linear_cross_entropy"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("M", "V", "d"), [(1, 97, 64), (1000, 3, 64), (777, 50257, 256), (4096, 100288, 128)])
def test_gpu_error_is_at_most_twice_that_of_plain_pytorch(M, V, d, dtype, backend, monkeypatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cuda", 1 << 27)  # several chunks
    hidden, weight, targets = make(M, V, d, dtype, "cuda")
    weight = weight / d**0.5
    exact = run(reference, hidden.double(), weight.double(), targets, 1.0)

    def plain(h, w, t):
        return F.cross_entropy((h @ w.T).float(), t, reduction="sum")

    expected = run(plain, hidden, weight, targets, 1.0)
    found = run(lambda *x: linear_cross_entropy(*x, backend=backend), hidden, weight, targets, 1.0)
    for name in NAMES:
        assert error(found[name], exact[name]) <= max(2 * error(expected[name], exact[name]), 2e-6), name
