"""flash-linear-attention's kernels are used where they agree, and fall back with one warning where they do not.

Stand-ins take the place of the library, which needs a GPU; on a GPU that has it, the kernels themselves are tried.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from oncelm.ops import fla_trust, gated_delta, short_convolution
from oncelm.ops.gated_delta import fla as delta
from oncelm.ops.short_convolution import fla as convolution

LENGTHS = [0, 3, 30]


@pytest.fixture
def library(monkeypatch):
    """A library whose functions are plain PyTorch with the library's arguments; `calls` counts them."""
    rule, modules = ModuleType("fla.ops.gated_delta_rule"), ModuleType("fla.modules.convolution")
    rule.calls = modules.calls = 0

    def chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
        rule.calls += 1
        options = {"initial_state": initial_state, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
        return gated_delta(q, k, v, g, beta, scale=scale, **options, backend="recurrent")

    def causal_conv1d(x, weight, initial_state, output_final_state, activation, cu_seqlens):
        modules.calls += 1
        assert activation == "silu"
        state = initial_state.mT[:, 1:]
        y, final = short_convolution(
            x, weight, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, backend="naive"
        )
        return y, F.pad(final.mT, (1, 0))

    rule.chunk_gated_delta_rule, modules.causal_conv1d = chunk_gated_delta_rule, causal_conv1d
    for module in (rule, modules):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fla_trust, "_trusted", {})
    return rule, modules


def delta_inputs(dtype=torch.bfloat16, K=16):
    T, H = sum(LENGTHS), 2
    q, k, v = torch.randn(1, T, H, K), F.normalize(torch.randn(1, T, H, K), dim=-1), torch.randn(1, T, H, 32)
    gates = F.logsigmoid(torch.randn(1, T, H)), torch.rand(1, T, H)
    return [*(x.to(dtype) for x in (q, k, v)), *gates]


BORDERS = torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("cu_seqlens", [None, BORDERS], ids=["dense", "packed"])
@pytest.mark.parametrize("with_state", [True, False])
def test_kernels_that_agree_are_used(library, cu_seqlens, with_state):
    rule, modules = library
    inputs, N = delta_inputs(), 1 if cu_seqlens is None else 3
    state = torch.randn(N, 2, 16, 32) if with_state else None
    o, final = delta.chunk(*inputs, 0.5, state, cu_seqlens)
    expected = gated_delta(
        *inputs, scale=0.5, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, backend="chunk"
    )
    assert rule.calls == 2  # the trial, and this
    torch.testing.assert_close(o.to(inputs[2].dtype), expected[0], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(final, expected[1], rtol=1e-4, atol=1e-5)

    x, weight, state = torch.randn(1, sum(LENGTHS), 6), torch.randn(6, 4), torch.randn(N, 3, 6)
    found = convolution.convolve(x, weight, state, cu_seqlens)
    exact = short_convolution(x, weight, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    assert modules.calls == 2
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got, wanted)


def test_each_combination_is_tried_once(library):
    rule, _ = library
    inputs = delta_inputs()
    for calls in (2, 3):
        delta.chunk(*inputs, 1.0, None)
        assert rule.calls == calls
    delta.chunk(*(x.clone().requires_grad_() for x in inputs), 1.0, None)  # the backward pass is another matter
    assert rule.calls == 5
    delta.chunk(*delta_inputs(K=32), 1.0, None)
    assert rule.calls == 7


def test_behind_its_trial_no_tensor_is_sent_to_the_gpu(library, monkeypatch):
    x, weight, state = torch.randn(1, sum(LENGTHS), 6), torch.randn(6, 4), torch.randn(3, 3, 6)
    for _ in range(2):
        delta.chunk(*delta_inputs(), 1.0, None, BORDERS)
        convolution.convolve(x, weight, state, BORDERS)
        monkeypatch.setattr(torch, "tensor", refuses)


@pytest.mark.parametrize("inputs", [{"dtype": torch.float32}, {"K": 24}, {"K": 272}])
def test_kernels_are_not_asked_for_what_they_round_or_lack(library, inputs):
    made = delta_inputs(**inputs)
    found = delta.chunk(*made, 1.0, None)
    exact = gated_delta(*made, scale=1.0, output_final_state=True, backend="chunk")
    assert library[0].calls == 0
    for got, wanted in zip(found, exact, strict=True):
        assert torch.equal(got.to(wanted.dtype), wanted)


def refuses(*args, **kwargs):
    raise RuntimeError("Triton >= 3.4.0 on Hopper GPUs produces incorrect results\nand more")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda right: refuses, "RuntimeError: Triton >= 3.4.0 on Hopper GPUs produces incorrect results\\)"),
        (lambda right: lambda *a, **b: [x * 1.1 for x in right(*a, **b)], "they differ from the definition by 0.1"),
        (lambda right: lambda *a, **b: [x * torch.nan for x in right(*a, **b)], "differ from the definition by inf"),
    ],
)
def test_kernels_that_are_wrong_here_are_left_with_one_warning(library, change, reason):
    rule, _ = library
    rule.chunk_gated_delta_rule = change(rule.chunk_gated_delta_rule)
    inputs = delta_inputs()
    with pytest.warns(UserWarning, match=f"gated_delta without gradients in bfloat16 runs in PyTorch.*{reason}"):
        found = delta.chunk(*inputs, 1.0, None)
    exact = gated_delta(*inputs, scale=1.0, output_final_state=True, backend="chunk")
    torch.testing.assert_close(found[0].to(exact[0].dtype), exact[0], atol=0, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.chunk(*inputs, 1.0, None)


def test_a_library_that_is_not_there_is_done_without(monkeypatch):
    monkeypatch.setattr(fla_trust, "_trusted", {})
    monkeypatch.setitem(sys.modules, "fla.modules.convolution", None)
    x, weight, state = torch.randn(1, 7, 6), torch.randn(6, 4), torch.randn(1, 3, 6)
    with pytest.warns(UserWarning, match="short_convolution .* runs in PyTorch.*ModuleNotFoundError"):
        y, _ = convolution.convolve(x, weight, state)
    torch.testing.assert_close(y, short_convolution(x, weight, initial_state=state)[0])


def test_a_full_memory_says_nothing_about_the_kernels(library):
    rule, _ = library
    right = rule.chunk_gated_delta_rule

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    rule.chunk_gated_delta_rule = full
    with pytest.raises(torch.OutOfMemoryError):
        delta.chunk(*delta_inputs(), 1.0, None)
    rule.chunk_gated_delta_rule = right
    delta.chunk(*delta_inputs(), 1.0, None)
    assert rule.calls == 2


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ops_on_a_gpu_are_right_whoever_computes_them(dtype, gradients, packed):
    T, H, D = 300, 3, 64
    borders = torch.tensor([0, 100, 100, 101, T], device="cuda") if packed else None
    made = torch.randn(1, T, H, D), F.normalize(torch.randn(1, T, H, D), dim=-1), torch.randn(1, T, H, D)
    inputs = [*(x.to(dtype) for x in made), F.logsigmoid(torch.randn(1, T, H)), torch.rand(1, T, H)]
    inputs = [x.cuda().requires_grad_(gradients) for x in inputs]

    def run(backend):
        results = gated_delta(*inputs, output_final_state=True, cu_seqlens=borders, backend=backend)
        if not gradients:
            return results
        return *results, *torch.autograd.grad(results, inputs, [x.detach().sin() for x in results])

    for found, exact in zip(run("auto"), run("chunk"), strict=True):
        assert found.dtype == exact.dtype
        assert (found.double() - exact.double()).norm() <= fla_trust.TOLERANCE[dtype] * exact.double().norm()
