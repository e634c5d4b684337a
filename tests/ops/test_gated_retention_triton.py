"""Gated retention in Triton against the reference in float64: in the interpreter on small shapes, on a GPU in full.

The interpreter needs TRITON_INTERPRET=1 set before Triton is imported; bfloat16 is tested on a GPU only.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses import FakeTensorMode

from oncelm.ops import dispatch, gated_retention
from oncelm.ops.gated_retention.chunk import chunk as portable
from oncelm.ops.gated_retention.naive import parallel

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 for the interpreter", allow_module_level=True)

from oncelm.ops.gated_retention import triton as kernels  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "d_initial_state")
SCALE = 0.3


def make(B, T, H, K, V, sequences=None, dtype=torch.float32, device=DEVICE, seed=0):
    """q, k, v, g, the initial state, and the gradients of o and of the final state."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    N = B if sequences is None else sequences
    q, k, v = (normal(B, T, H, D).to(dtype) for D in (K, K, V))
    g = torch.nn.functional.logsigmoid(normal(B, T, H)) / 4
    return q, k, v, g, normal(N, H, K, V), normal(B, T, H, V).to(dtype), normal(N, H, K, V)


def run(function, inputs, weights):
    """The outputs of function(*inputs) and the gradients of their weighted sum, under NAMES."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    return dict(zip(NAMES, [y.detach() for y in outputs] + [x.grad for x in inputs], strict=True))


def packed(function, bounds):
    """`function` applied to each packed sequence alone."""

    def apply(q, k, v, g, state):
        parts = [
            function(*(x[:, a:b] for x in (q, k, v, g)), SCALE, state[n : n + 1])
            for n, (a, b) in enumerate(pairwise(bounds))
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])

    return apply


def reference(tensors, bounds=None):
    """The definition in float64."""
    *inputs, do, ds = (x.double() for x in tensors)
    return run(packed(parallel, bounds) if bounds else lambda *x: parallel(*x[:4], SCALE, x[4]), inputs, (do, ds))


def ours(tensors, bounds=None, segment=0):
    *inputs, do, ds = tensors
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=inputs[0].device)
    return run(lambda *x: kernels.chunk(*x[:4], SCALE, x[4], cu_seqlens, segment=segment), inputs, (do, ds))


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def assert_close(found, expected, tolerance):
    errors = {name: error(found[name], expected[name]) for name in NAMES}
    assert all(e <= tolerance for e in errors.values()), errors  # NaN fails


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is NaN, so an element nobody wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(3).new_empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V", "segment"),
    [
        (2, 1, 2, 16, 16, 0),
        (1, 63, 2, 16, 32, 0),
        (2, 65, 1, 32, 16, 32),
        (1, 100, 3, 16, 16, 40),
        (1, 300, 1, 32, 32, 0),
        (1, 300, 1, 16, 16, 128),
        (1, 0, 1, 16, 16, 0),
        (1, 40, 1, 24, 20, 0),
        (1, 33, 1, 64, 64, 0),
    ],
)
def test_every_output_and_gradient(B, T, H, K, V, segment):
    tensors = make(B, T, H, K, V)
    assert_close(ours(tensors, segment=segment), reference(tensors), 2e-5)


@pytest.mark.parametrize("segment", [0, 32])
@pytest.mark.parametrize("bounds", [[0, 0, 40, 41, 41, 105, 105], [0, 64, 64], [0, 7], [0, 0, 0]])
def test_packed_sequences(bounds, segment):
    tensors = make(1, bounds[-1], 2, 16, 16, len(bounds) - 1)
    assert_close(ours(tensors, bounds, segment), reference(tensors, bounds), 2e-5)


def test_float16():
    tensors = make(1, 70, 2, 16, 32, dtype=torch.float16)
    assert_close(ours(tensors, segment=48), reference(tensors), 3e-3)


def test_without_initial_state_or_final_gradient():
    q, k, v, g, _, do, _ = make(1, 130, 2, 16, 16)
    expected = torch.zeros(1, 2, 16, 16, device=DEVICE)
    for segment in (0, 64):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, g)]
        doubles = [x.double().requires_grad_() for x in (q, k, v, g)]
        (kernels.chunk(*inputs, SCALE, None, segment=segment)[0] * do).sum().backward()
        (parallel(*doubles, SCALE, expected)[0] * do).sum().backward()
        for x, y in zip(inputs, doubles, strict=True):
            assert error(x.grad, y.grad) < 2e-5


def test_only_the_final_state_has_a_gradient():
    q, k, v, g, state, _, ds = make(1, 50, 1, 16, 16)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, g, state)]
    doubles = [x.double().requires_grad_() for x in (q, k, v, g, state)]
    (kernels.chunk(*inputs[:4], SCALE, inputs[4])[1] * ds).sum().backward()
    (parallel(*doubles[:4], SCALE, doubles[4])[1] * ds).sum().backward()
    assert inputs[0].grad.abs().max() == 0
    for x, y in zip(inputs[1:], doubles[1:], strict=True):
        assert error(x.grad, y.grad) < 2e-5


def test_a_segment_of_more_chunks_than_are_looked_through_at_once():
    q, k, v, g, *_ = make(1, 1056, 1, 16, 16)
    zeros = torch.zeros(1, 1, 16, 16, device=DEVICE)
    o, _ = kernels.chunk(q, k, v, g / 1000, SCALE, None, segment=1040)
    expected, _ = parallel(*(x.double() for x in (q, k, v, g / 1000)), SCALE, zeros.double())
    assert error(o[:, 1040:], expected[:, 1040:]) < 2e-5


def test_what_has_decayed_counts_while_float32_can_hold_it():
    """Only the first eight tokens write, and forty later the next segment reads what is left: some 2^-100."""
    q, k, v, g, state, *_ = make(1, 96, 1, 16, 16)
    k[:, 8:] = 0
    g = torch.full_like(g, -100 / 40 * 0.693)
    found, _ = kernels.chunk(q, k, v, g, SCALE, torch.zeros_like(state), segment=48)
    expected, _ = parallel(*(x.double() for x in (q, k, v, g)), SCALE, torch.zeros_like(state).double())
    start = slice(48, 52)
    assert 0 < expected[:, start].abs().max() < 1e-28
    assert (found[:, start].double() * 1e28 - expected[:, start] * 1e28).norm() < 1e-4 * (
        expected[:, start] * 1e28
    ).norm()


def test_strong_decay_neither_overflows_nor_turns_nan():
    q, k, v, g, state, do, ds = make(1, 70, 1, 16, 16)
    tensors = (q, k, v, g - 40, state, do, ds)
    found, expected = ours(tensors), reference(tensors)
    assert all(torch.isfinite(x).all() for x in found.values())
    for name in ("o", "final_state", "dq", "dk", "dv"):  # the two others are as good as zero
        assert error(found[name], expected[name]) < 2e-5
    for name in ("dg", "d_initial_state"):
        assert (found[name] - expected[name]).abs().max() < 2e-5


def test_float64_runs_the_portable_form():
    tensors = make(1, 20, 1, 16, 16)
    doubles = tuple(x.double() for x in tensors)
    assert_close(ours(doubles), reference(tensors), 1e-12)
    bounds = [0, 7, 7, 20]
    tensors = make(1, 20, 1, 16, 16, 3)
    assert_close(ours(tuple(x.double() for x in tensors), bounds), reference(tensors, bounds), 1e-12)


def test_wrong_borders_stay_inside_the_tensors():
    q, k, v, g, *_ = make(1, 40, 1, 16, 16)
    for bounds in ([0, 90], [0, 30, 20, 40], [-5, 40]):
        o, _ = kernels.chunk(q, k, v, g, SCALE, None, torch.tensor(bounds, device=DEVICE), segment=32)
        assert o.shape == v.shape


def test_public_function_takes_it_as_a_backend(monkeypatch):
    row = replace(dispatch.TABLE["gated_retention"][0], devices=("cpu", "cuda"))
    monkeypatch.setitem(dispatch.TABLE, "gated_retention", (row,))
    bounds = [0, 5, 5, 40]
    q, k, v, g, state, *_ = tensors = make(1, 40, 2, 16, 16, 3)
    for backend in ("auto", "triton"):
        o, final = gated_retention(
            q, k, v, g, scale=SCALE, initial_state=state, output_final_state=True, backend=backend,
            cu_seqlens=torch.tensor(bounds, device=DEVICE),
        )  # fmt: skip
        expected = reference(tensors, bounds)
        assert error(o, expected["o"]) < 2e-5
        assert error(final, expected["final_state"]) < 2e-5


def test_operators_are_registered_properly():
    q, k, v, g, state, *_ = make(1, 40, 1, 16, 16)
    inputs = [x.requires_grad_() for x in (q, k, v, g, state)]
    for cu_seqlens, size in ((None, 0), (None, 32), (torch.tensor([0, 40], device=DEVICE), 32)):
        arguments = (*inputs[:4], SCALE, inputs[4], cu_seqlens, size)
        torch.library.opcheck(
            kernels.forward_op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def test_compiled_graph_is_whole():
    q, k, v, g, state, *_ = make(1, 40, 1, 16, 16)
    inputs = [x.requires_grad_() for x in (q, k, v, g, state)]

    def step(q, k, v, g, state):
        return kernels.chunk(q * 2, k, v, g, SCALE, state)[0].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*inputs), inputs)
    found = torch.autograd.grad(compiled(*inputs), inputs)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("dtype", "K", "V", "capability", "expected"),
    [
        (torch.bfloat16, 128, 128, (9, 0), True),
        (torch.float16, 64, 256, (9, 0), True),
        (torch.bfloat16, 32, 128, (9, 0), False),
        (torch.float32, 128, 128, (9, 0), False),
        (torch.bfloat16, 128, 128, (8, 0), False),
        (torch.bfloat16, 128, 128, (10, 0), False),
    ],
)
def test_hopper_kernels_run_where_they_can(monkeypatch, dtype, K, V, capability, expected):
    monkeypatch.setattr(kernels.gpu, "capability", lambda index: capability)
    with FakeTensorMode():
        q, v = (torch.empty(1, 64, 2, D, dtype=dtype, device="cuda") for D in (K, V))
    for kernel in ("forward", "key_value", "query"):
        form = kernels.config(kernel, q, v)
        assert (form.num_stages == 0) == expected
        assert K % form.block == V % form.block == 0
        if expected:
            assert form.block == 16 * form.num_warps
            assert form.block in (64, 128)
    assert kernels.config("states", q, v).num_stages > 0


def test_missing_package_is_skipped_or_named(monkeypatch):
    ours, *others = dispatch.TABLE["gated_retention"]
    missing = replace(ours, devices=("cpu",), needs="no_such_package")
    monkeypatch.setitem(dispatch.TABLE, "gated_retention", (missing, *others))
    assert dispatch.choose("gated_retention", "auto", torch.device("cpu")).backend == "chunk"
    with pytest.raises(ValueError, match="pip install no_such_package"):
        dispatch.choose("gated_retention", "triton", torch.device("cpu"))


def rounded_matmuls(q, k, v, g, scale, state, dtype, chunk_size=64):
    """Plain PyTorch in a 16-bit dtype: the portable form with every matrix product in that dtype."""
    with torch.autocast(q.device.type, dtype=dtype):
        return portable(q, k, v, g, scale, state, chunk_size)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "V", "segment"),
    [
        (1, 1000, 3, 64, 64, 0),
        (2, 777, 4, 128, 128, 0),
        (1, 2049, 2, 256, 256, 0),
        (1, 1500, 2, 64, 256, 256),
        (1, 1500, 2, 256, 128, 512),
        (1, 8000, 4, 128, 128, 1024),
        (1, 8192, 2, 128, 128, 4096),
        (1, 500, 2, 32, 128, 256),
        (1, 500, 2, 16, 256, 0),
    ],
)
def test_gpu_error_is_at_most_twice_that_of_plain_pytorch(B, T, H, K, V, segment, dtype):
    tensors = make(B, T, H, K, V, dtype=dtype)
    expected = reference(tensors)
    *inputs, do, ds = tensors
    if dtype == torch.float32:
        plain = run(lambda *x: portable(*x[:4], SCALE, x[4], 64), inputs, (do, ds))
    else:
        plain = run(lambda *x: rounded_matmuls(*x[:4], SCALE, x[4], dtype), inputs, (do, ds))
    found = ours(tensors, segment=segment)
    for name in NAMES:
        allowed = max(2 * error(plain[name], expected[name]), 5e-7)
        assert error(found[name], expected[name]) <= allowed, name


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_gpu_offsets_beyond_32_bits():
    B, T, H, D = 1, 4 * 2**20, 9, 64
    assert B * T * H * D > 2**31
    tail = 4096  # far enough that the state before it has decayed to nothing
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g = torch.full((B, T, H), -0.05, device="cuda")
    for segment in (0, T):
        o, final = kernels.chunk(q, k, v, g, SCALE, None, segment=segment)
        last = [x[:, -tail:].double() for x in (q, k, v, g)]
        expected, expected_final = portable(*last, SCALE, None)
        assert error(o[:, -tail // 2 :], expected[:, -tail // 2 :]) < 1e-2
        assert error(final, expected_final) < 1e-2
        assert torch.isfinite(o).all()
