"""Window and global attention against their definition."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops import global_attention, window_attention
from oncelm.ops.attention import sdpa, varlen
from oncelm.ops.dispatch import TABLE


def make_qkv(B: int, T: int, S: int, H: int, H_kv: int, D: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, n, h, D, generator=generator) for n, h in ((T, H), (S, H_kv), (S, H_kv)))


HEADS = st.sampled_from([(2, 2), (4, 2), (4, 1)])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "QUERY_BLOCK", 16)  # so that small shapes take several blocks


@settings(max_examples=60, deadline=None)
@given(T=st.integers(0, 60), past=st.integers(0, 40), window=st.integers(1, 70), heads=HEADS, B=st.integers(1, 2))
def test_window(T: int, past: int, window: int, heads: tuple[int, int], B: int) -> None:
    q, k, v = make_qkv(B, T, T + past, *heads)
    got = window_attention(q, k, v, window_size=window)
    torch.testing.assert_close(got, window_attention(q, k, v, window_size=window, backend="naive"))


@settings(max_examples=60, deadline=None)
@given(P=st.integers(0, 50), before=st.integers(0, 40), after=st.integers(0, 20), heads=HEADS, B=st.integers(1, 2))
def test_global_from_a_start(P: int, before: int, after: int, heads: tuple[int, int], B: int) -> None:
    q, k, v = make_qkv(B, P, before + P + after, *heads)
    got = global_attention(q, k, v, start=before)
    torch.testing.assert_close(got, global_attention(q, k, v, start=before, backend="naive"))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), P=st.integers(0, 40), S=st.integers(1, 60), heads=HEADS, B=st.integers(1, 3))
def test_global_at_any_positions(data: st.DataObject, P: int, S: int, heads: tuple[int, int], B: int) -> None:
    rows = data.draw(st.sampled_from([1, B]))
    positions = torch.tensor(data.draw(st.lists(st.integers(0, S - 1), min_size=rows * P, max_size=rows * P)))
    positions = positions.view(rows, P).long()
    q, k, v = make_qkv(B, P, S, *heads)
    got = global_attention(q, k, v, positions=positions)
    torch.testing.assert_close(got, global_attention(q, k, v, positions=positions, backend="naive"))


def test_window_gradients() -> None:
    gradients = []
    for backend in ("sdpa", "naive"):
        q, k, v = (x.double().requires_grad_() for x in make_qkv(2, 40, 50, 4, 2))
        window_attention(q, k, v, window_size=13, backend=backend).sin().sum().backward()
        gradients.append([x.grad for x in (q, k, v)])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def gradients(function, *inputs):
    """The output and the gradients of its sum of sines."""
    leaves = [x.double().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, window=st.integers(1, 40), heads=HEADS, backend=st.sampled_from(["sdpa", "naive"]))
def test_packed_windows_are_those_of_each_sequence(lengths, window: int, heads: tuple[int, int], backend: str) -> None:
    inputs = list(make_qkv(1, sum(lengths), sum(lengths), *heads))

    def packed(q, k, v):
        return window_attention(q, k, v, window_size=window, cu_seqlens=borders(lengths), backend=backend)

    def alone(q, k, v):
        parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([window_attention(*part, window_size=window, backend="naive") for part in parts], dim=1)

    for got, expected in zip(gradients(packed, *inputs), gradients(alone, *inputs), strict=True):
        torch.testing.assert_close(got, expected)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, data=st.data(), heads=HEADS)
def test_packed_queries_stand_at_the_end_of_their_keys(lengths, data: st.DataObject, heads: tuple[int, int]) -> None:
    past = data.draw(st.lists(st.integers(0, 20), min_size=len(lengths), max_size=len(lengths)))
    ends = [a + b for a, b in zip(lengths, past, strict=True)]
    inputs = list(make_qkv(1, sum(lengths), sum(ends), *heads))

    def packed(q, k, v):
        return global_attention(q, k, v, cu_seqlens=borders(lengths), cu_seqlens_k=borders(ends))

    def alone(q, k, v):
        parts = zip(q.split(lengths, dim=1), *(x.split(ends, dim=1) for x in (k, v)), strict=True)
        return torch.cat([global_attention(*part, backend="naive") for part in parts], dim=1)

    for got, expected in zip(gradients(packed, *inputs), gradients(alone, *inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_bad_borders() -> None:
    q, k, v = make_qkv(1, 4, 6, 4, 2)
    with pytest.raises(ValueError, match="4 packed queries have 6 keys: give cu_seqlens_k"):
        global_attention(q, k, v, cu_seqlens=borders([4]))
    with pytest.raises(ValueError, match="packs 2 sequences, cu_seqlens_k 1"):
        global_attention(q, k, v, cu_seqlens=borders([1, 3]), cu_seqlens_k=borders([6]))
    with pytest.raises(ValueError, match="fewer keys than"):
        global_attention(q, k, v, cu_seqlens=borders([1, 3]), cu_seqlens_k=borders([5, 1]))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens 4"):
        global_attention(q, k, v, cu_seqlens=borders([5]), cu_seqlens_k=borders([6]))
    with pytest.raises(ValueError, match="start or positions, or cu_seqlens"):
        global_attention(q, k, v, start=0, cu_seqlens=borders([4]), cu_seqlens_k=borders([6]))
    with pytest.raises(ValueError, match="need batch size 1, got 2"):
        window_attention(*make_qkv(2, 4, 4, 2, 2), window_size=2, cu_seqlens=borders([4]))


def documented_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch documents of varlen_attn: queries stand at the end of their keys, `left` keys before each are seen."""
    left, right = window_size
    assert right == 0
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert max(cu_q.diff()) <= max_q
    assert max(cu_k.diff()) <= max_k
    outputs = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        seen = d - c if left == -1 else left + 1
        if b > a:
            one = (x[None] for x in (q[a:b], k[c:d], v[c:d]))
            outputs.append(window_attention(*one, window_size=seen, scale=scale, backend="naive")[0])
    return torch.cat(outputs)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    lengths=LENGTHS,
    past=st.integers(0, 20),
    window=st.integers(1, 40),
    heads=HEADS,
    B=st.integers(1, 2),
)
def test_flash_attention_is_asked_the_right_question(data, lengths, past, window, heads, B) -> None:
    def half(T, S, B=1):
        return [x.bfloat16() for x in make_qkv(B, T, S, *heads)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", documented_varlen)
        patch.setattr(varlen, "ASKS_FOR_GQA", True)
        patch.setattr(varlen, "_has_flash", lambda index: True)
        for op in ("window_attention", "global_attention"):
            rows = [replace(row, devices=("cpu",)) for row in TABLE[op] if row.backend in ("varlen", "naive")]
            patch.setitem(TABLE, op, tuple(rows))
        T, total = lengths[0], sum(lengths)
        ends = [length + data.draw(st.integers(0, 9)) for length in lengths]
        cases = [
            (window_attention, half(T, T + past, B), {"window_size": window}),
            (window_attention, half(total, total), {"window_size": window, "cu_seqlens": borders(lengths)}),
            (global_attention, half(T, T + past + 3, B), {"start": past}),
            (
                global_attention,
                half(total, sum(ends)),
                {"cu_seqlens": borders(lengths), "cu_seqlens_k": borders(ends), "max_seqlen": max(ends)},
            ),
        ]
        for op, inputs, options in cases:
            got, expected = (op(*inputs, **options, backend=name) for name in ("varlen", "naive"))
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------------------------------------- on a GPU

WINDOWS = [row for row in TABLE["window_attention"] if "cuda" in row.devices and row.backend != "naive"]


def on_gpu(B: int, T: int, S: int, H: int, H_kv: int, D: int, dtype: torch.dtype):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((B, T, H, D), (B, S, H_kv, D), (B, S, H_kv, D), (B, T, H, D))
    return [torch.randn(*shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes]


def outputs(function, q, k, v, d_out):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))


def assert_at_most_twice_the_error(function, plain, exact, inputs) -> None:
    """Of `plain`, both against `exact` in float64."""
    expected = outputs(exact, *(x.double() for x in inputs))
    for found, other, true in zip(outputs(function, *inputs), outputs(plain, *inputs), expected, strict=True):
        allowed = 2 * (other.double() - true).norm() + 1e-6 * true.norm() + 1e-5
        assert (found.double() - true).norm() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [row.backend for row in WINDOWS if row.backend != "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "B", "T", "S", "H", "H_kv", "D", "window"),  # a backend may compile itself for each
    [
        (torch.bfloat16, 2, 768, 768, 4, 2, 128, 200),
        (torch.bfloat16, 1, 1024, 1024, 2, 2, 64, 256),
        (torch.bfloat16, 1, 512, 900, 4, 1, 128, 300),
        (torch.bfloat16, 3, 512, 512, 4, 2, 72, 127),
        (torch.bfloat16, 1, 2048, 2048, 2, 1, 128, 1024),
        (torch.bfloat16, 1, 333, 400, 2, 1, 256, 1),
        (torch.bfloat16, 1, 1, 40, 2, 1, 64, 7),
        (torch.bfloat16, 1, 256, 256, 2, 1, 64, 1000),
        *((dtype, 1, 512, 900, 4, 1, 128, 300) for dtype in (torch.float16, torch.float32)),
        *((dtype, 3, 512, 512, 4, 2, 72, 127) for dtype in (torch.float16, torch.float32)),
    ],
)
def test_gpu_windows(B, T, S, H, H_kv, D, window, dtype, backend) -> None:
    if not next(row for row in WINDOWS if row.backend == backend).available:
        pytest.skip(f"{backend} is not installed")

    def by(name: str):
        return lambda q, k, v: window_attention(q, k, v, window_size=window, backend=name)

    inputs = on_gpu(B, T, S, H, H_kv, D, dtype)
    assert_at_most_twice_the_error(by(backend), by("sdpa"), by("naive"), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 100])
def test_gpu_packed(window: int | None, dtype: torch.dtype) -> None:
    lengths, past = [1, 500, 0, 300, 64, 777], [0, 3, 5, 0, 200, 1]
    ends = lengths if window else [a + b for a, b in zip(lengths, past, strict=True)]
    inputs = on_gpu(1, sum(lengths), sum(ends), 4, 2, 64, dtype)
    options = {"cu_seqlens": borders(lengths).cuda(), "max_seqlen": max(ends)}
    options |= {"window_size": window} if window else {"cu_seqlens_k": borders(ends).cuda()}
    op = window_attention if window else global_attention

    def by(name: str):
        return lambda q, k, v: op(q, k, v, **options, backend=name)

    assert_at_most_twice_the_error(by("auto"), by("sdpa"), by("naive"), inputs)


@pytest.mark.gpu
def test_gpu_training_of_the_cross_decoder_uses_a_flash_kernel() -> None:
    q, k, v, d_out = on_gpu(2, 2047, 2048, 8, 2, 128, torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        outputs(lambda q, k, v: global_attention(q, k, v, start=0), q, k, v, d_out)
    kernels = " ".join(event.key for event in profiled.key_averages())
    assert "flash" in kernels
    assert "bprop" in kernels or "flash_bwd" in kernels


@pytest.mark.gpu
def test_gpu_compiled_window_is_one_graph() -> None:
    q, k, v, d_out = on_gpu(1, 512, 512, 4, 2, 64, torch.bfloat16)

    def function(q, k, v):
        return window_attention(q * 2, k, v, window_size=100)

    for found, expected in zip(
        outputs(torch.compile(function, fullgraph=True, backend="aot_eager"), q, k, v, d_out),
        outputs(function, q, k, v, d_out),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_bad_arguments() -> None:
    q, k, v = make_qkv(1, 4, 6, 4, 2)
    with pytest.raises(ValueError, match="window_size must be at least 1"):
        window_attention(q, k, v, window_size=0)
    with pytest.raises(ValueError, match="a key for every query"):
        window_attention(q, k[:, :3], v[:, :3], window_size=2)
    with pytest.raises(ValueError, match="lie outside the 6 keys"):
        global_attention(q, k, v, start=3)
    with pytest.raises(ValueError, match="not a multiple"):
        global_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="start or positions"):
        global_attention(q, k, v, start=0, positions=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"positions must be \[B or 1, P\]"):
        global_attention(q, k, v, positions=torch.zeros(4, dtype=torch.long))
