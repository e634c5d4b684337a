"""Decode attention: the PyTorch forms against softmax in float64; the kernels against the reference.

The kernels run in Triton's interpreter on small shapes (TRITON_INTERPRET=1, set before Triton is imported), on a GPU in
full; bfloat16 on a GPU only.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops import decode_attention, dispatch, quantize_kv
from oncelm.ops.attention import decode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
KERNELS = importlib.util.find_spec("triton") is not None and (INTERPRETED or DEVICE == "cuda")
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs Triton and a GPU, or TRITON_INTERPRET=1")
if KERNELS:
    from oncelm.ops.attention import decode_triton as kernels

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def make(lengths, T=1, heads=(4, 2), D=16, S=None, dtype=torch.float32, device=DEVICE, seed=0):
    """q, k, v, lengths; keys and values lie head by head and are NaN behind each sequence's length."""
    generator = torch.Generator().manual_seed(seed)
    (H, H_kv), N, S = heads, len(lengths), max(lengths) + 3 if S is None else S
    q = torch.randn(N, T, H, D, generator=generator)
    k, v = (torch.randn(N, H_kv, S, D, generator=generator).transpose(1, 2) for _ in range(2))
    for n, length in enumerate(lengths):
        k[n, length:], v[n, length:] = torch.nan, torch.nan
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return q, k, v, torch.tensor(lengths, device=device, dtype=torch.int32)


def exact(q, k, v, lengths, scale=None):
    """Softmax in float64, a sequence and a query after the other."""
    o = torch.zeros(q.shape, dtype=torch.float64)
    q, k, v = (x.double().cpu() for x in (q, k, v))
    _, T, H, D = q.shape
    groups = H // k.shape[2]
    for n, length in enumerate(lengths.tolist()):
        for t in range(T):
            seen = length - T + t + 1
            for h in range(H if seen > 0 else 0):
                scores = k[n, :seen, h // groups] @ q[n, t, h] * (D**-0.5 if scale is None else scale)
                o[n, t, h] = scores.softmax(0) @ v[n, :seen, h // groups]
    return o


def paged(x, page, spare=2, seed=1):
    """x [N, S, ...] as blocks in any order, and the tables that find them; spare blocks are of no sequence."""
    N, S = x.shape[:2]
    count = -(-S // page)
    order = torch.randperm(N * count + spare, generator=torch.Generator().manual_seed(seed)).to(x.device)
    blocks = torch.zeros(len(order), page, *x.shape[2:], device=x.device)
    tables = order[: N * count].view(N, count)
    for n in range(N):
        for i in range(count):
            part = x[n, i * page : (i + 1) * page].float()
            blocks[tables[n, i], : len(part)] = part
    return blocks.to(x.dtype), tables.int()


def error(found, expected):
    return ((found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().clamp(min=1e-30)).item()


LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=4)
HEADS = st.sampled_from([(2, 2), (3, 1), (6, 2), (8, 1)])


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, T=st.integers(1, 8), heads=HEADS, page=st.sampled_from([0, 16, 32]), seed=st.integers(0, 9))
def test_pytorch_forms(lengths, T, heads, page, seed) -> None:
    q, k, v, counts = make(lengths, T, heads, device="cpu", seed=seed)
    expected = exact(q, k, v, counts)
    tables = None
    if page:
        k, tables = paged(k, page)
        v, _ = paged(v, page)
    for backend in ("sdpa", "naive"):
        found = decode_attention(q, k, v, lengths=counts.long(), block_tables=tables, backend=backend)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "naive"])
def test_pytorch_forms_of_quantised_caches(dtype, backend) -> None:
    q, k, v, counts = make([40, 0, 21], 3, device="cpu")
    expected = exact(q, k, v, counts)
    (k, k_scale), (v, v_scale) = (quantize_kv(x, dtype) for x in (k, v))
    found = decode_attention(q, k, v, lengths=counts, k_scale=k_scale, v_scale=v_scale, backend=backend)
    assert error(found, expected) < (0.06 if dtype == FP8 else 0.02)
    pages = [paged(x, 16)[0] for x in (k, v, k_scale, v_scale)]
    tables = paged(k, 16)[1]
    again = decode_attention(
        q, *pages[:2], lengths=counts, block_tables=tables, k_scale=pages[2], v_scale=pages[3], backend=backend
    )
    torch.testing.assert_close(again, found)


def test_bad_arguments() -> None:
    q, k, v, lengths = make([5, 5], device="cpu")
    tables = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"lengths must be \[2\] int32 or int64"):
        decode_attention(q, k, v, lengths=lengths[:1])
    with pytest.raises(ValueError, match=r"the last 1\.\.16 tokens of a sequence, got 17"):
        decode_attention(q.expand(2, 17, 4, 16), k, v, lengths=lengths)
    with pytest.raises(ValueError, match="block_size of decode_attention must be 16"):
        decode_attention(q, k, v, lengths=lengths, block_tables=tables)
    with pytest.raises(ValueError, match=r"block_tables must be \[2, max_blocks\]"):
        decode_attention(q, k.new_zeros(3, 16, 2, 16), k.new_zeros(3, 16, 2, 16), lengths=lengths, block_tables=lengths)
    with pytest.raises(ValueError, match=r"of q's dtype torch\.float32, or of torch\.float8_e4m3fn or torch\.int8"):
        decode_attention(q, k.half(), v.half(), lengths=lengths)
    with pytest.raises(ValueError, match="k_scale goes with quantised"):
        decode_attention(q, k, v, lengths=lengths, k_scale=torch.ones(2, 8, 2))
    scales = torch.ones(2, 8, 2)
    with pytest.raises(ValueError, match=r"v_scale must be float32 \[2, 8, 2\]"):
        decode_attention(q, k.to(INT8), v.to(INT8), lengths=lengths, k_scale=scales, v_scale=scales[:, :1])
    with pytest.raises(ValueError, match="not a multiple"):
        decode_attention(q[:, :, :3], k, v, lengths=lengths)


# -- the kernels ------------------------------------------------------------------------------------------------------


def ours(q, k, v, lengths, tables=None, scales=(None, None), scale=None, programs=0):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.attend(q, k, v, lengths, tables, *scales, scale, programs=programs)


@needs_kernels
@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize(
    ("lengths", "T", "heads", "D"),
    [
        ([70], 1, (2, 2), 16),
        ([40, 16], 16, (6, 2), 16),
        ([1], 1, (2, 2), 16),
        ([33, 0, 1, 64], 1, (6, 2), 16),
        ([0, 0], 2, (2, 1), 16),
        ([40, 3, 17], 4, (3, 1), 32),  # the second has fewer tokens than queries
        ([90, 5], 8, (8, 1), 16),  # 64 rows
        ([20], 3, (8, 1), 16),  # 24 rows in a tile of 32
        ([50, 16, 48], 1, (4, 2), 64),
    ],
)
def test_kernels_against_float64(lengths, T, heads, D, programs) -> None:
    tensors = make(lengths, T, heads, D)
    found, expected = ours(*tensors, programs=programs, scale=0.3), exact(*tensors, scale=0.3)
    assert torch.isfinite(found).all()
    assert error(found, expected) < 2e-6


@needs_kernels
@pytest.mark.parametrize("page", [16, 64])
def test_pages_and_any_strides_give_the_same_bits(page) -> None:
    q, k, v, lengths = make([50, 0, 77, 16], 2, (6, 2))
    expected = ours(q, k, v, lengths)
    assert torch.equal(ours(q, k.contiguous(), v.contiguous(), lengths.long()), expected)
    wide = torch.cat((k, v), dim=-1)  # keys and values side by side
    assert torch.equal(ours(q, wide[..., :16], wide[..., 16:], lengths), expected)
    assert torch.equal(ours(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, lengths), expected)
    (k, tables), (v, _) = paged(k, page), paged(v, page)
    assert torch.equal(ours(q, k, v, lengths, tables), expected)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(ours(q, *by_head, lengths, tables.long()), expected)


@needs_kernels
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.float16], ids=str)
def test_kernels_on_quantised_caches(dtype, kept) -> None:
    q, k, v, lengths = make([50, 0, 77], 2, (6, 2))
    v[0] *= 1e-4  # weights times such scales must not vanish in float16
    (k, k_scale), (v, v_scale) = (quantize_kv(x, dtype) for x in (k, v))
    expected = exact(q.to(kept), k.double() * k_scale[..., None], v.double() * v_scale[..., None], lengths)
    found = ours(q.to(kept), k, v, lengths, scales=(k_scale, v_scale))
    for n in (0, 2):
        assert error(found[n], expected[n]) < (2e-6 if kept == torch.float32 else 2e-3)
    pages = [paged(x, 16)[0] for x in (k, v, k_scale, v_scale)]
    again = ours(q.to(kept), *pages[:2], lengths, paged(k, 16)[1], pages[2:])
    assert torch.equal(again, found)


@needs_kernels
@pytest.mark.parametrize("dtype", [None, FP8, INT8], ids=str)
def test_scales_that_are_negative_or_zero(dtype) -> None:
    q, k, v, lengths = make([50, 0, 77], 2, (6, 2), D=32, dtype=torch.float16)
    scales, exact_k, exact_v = (None, None), k, v
    if dtype is not None:
        (k, k_scale), (v, v_scale) = (quantize_kv(x.nan_to_num(), dtype) for x in (k, v))
        scales = (k_scale, v_scale)
        exact_k, exact_v = k.double() * k_scale[..., None], v.double() * v_scale[..., None]
    for scale in (-0.3, 0.0):
        found = ours(q, k, v, lengths, scales=scales, scale=scale)
        assert error(found, exact(q, exact_k, exact_v, lengths, scale)) < 2e-3
    assert error(ours(q * 0, k, v, lengths, scales=scales), exact(q * 0, exact_k, exact_v, lengths)) < 2e-3


@needs_kernels
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_8_bit_caches_of_any_strides(dtype) -> None:
    q, k, v, lengths = make([50, 0, 130], 1, (6, 2), D=32, dtype=torch.float16)
    (k, k_scale), (v, v_scale) = (quantize_kv(x, dtype) for x in (k, v))
    for x in (k, v):
        for n, length in enumerate(lengths.tolist()):
            x.view(torch.uint8)[n, length:] = 0x7F  # NaN in float8
    expected = ours(q, k, v, lengths, scales=(k_scale, v_scale))
    assert torch.isfinite(expected).all()
    odd = torch.zeros(*k.shape[:3], 67, dtype=torch.uint8, device=DEVICE)
    odd_k, odd_v = odd[..., 1:33], odd[..., 35:]
    odd_k.copy_(k.view(torch.uint8))
    odd_v.copy_(v.view(torch.uint8))
    assert torch.equal(ours(q, odd_k.view(dtype), odd_v.view(dtype), lengths, scales=(k_scale, v_scale)), expected)
    for page in (16, 64, 128):  # smaller than a tile, as large, larger
        pages = [paged(x, page)[0] for x in (k, v, k_scale, v_scale)]
        found = ours(q, *pages[:2], lengths, paged(k, page)[1], pages[2:])
        assert torch.equal(found, expected)


@needs_kernels
def test_float16() -> None:
    tensors = make([50, 77], 1, (6, 2), dtype=torch.float16)
    assert error(ours(*tensors), exact(*tensors)) < 2e-3


@needs_kernels
def test_what_no_kernel_takes_runs_in_pytorch() -> None:
    for changes in ({"D": 24}, {"dtype": torch.float64}, {"T": 8, "heads": (17, 1)}):
        tensors = make([20, 9], **changes)
        assert error(ours(*tensors), exact(*tensors)) < 2e-6


@needs_kernels
def test_wrong_lengths_and_tables_stay_inside_the_tensors() -> None:
    q, k, v, _ = make([40, 40], S=40)
    for lengths in ([90, 40], [-5, 40]):
        assert torch.isfinite(ours(q, k, v, torch.tensor(lengths, device=DEVICE))).all()


@needs_kernels
def test_public_function_takes_them_as_a_backend(monkeypatch) -> None:
    row = replace(dispatch.TABLE["decode_attention"][0], devices=("cpu", "cuda"))
    monkeypatch.setitem(dispatch.TABLE, "decode_attention", (row,))
    q, k, v, lengths = make([30, 7])
    for backend in ("auto", "triton"):
        found = decode_attention(q, k, v, lengths=lengths, backend=backend)
        assert error(found, exact(q, k, v, lengths)) < 2e-6


@needs_kernels
def test_operator_is_registered_properly() -> None:
    q, k, v, lengths = make([30, 7], 2)
    k, v = k.nan_to_num(), v.nan_to_num()
    (k_8, k_scale), (v_8, v_scale) = (quantize_kv(x, INT8) for x in (k, v))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in ((q, k, v, lengths, None, None, None), (q, k_8, v_8, lengths, None, k_scale, v_scale)):
        torch.library.opcheck(kernels.decode_op, (*arguments, 0.3, 0), test_utils=tests)


@needs_kernels
def test_compiled_graph_is_whole() -> None:
    q, k, v, lengths = make([30, 7])

    def step(q, lengths):
        return ours(q * 2, k, v, lengths) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, lengths), step(q, lengths))


def test_no_sequences() -> None:
    q, k, v, lengths = make([3])
    for backend in ("sdpa", "naive"):
        found = decode_attention(q[:0], k[:0], v[:0], lengths=lengths[:0], backend=backend)
        assert found.shape == (0, *q.shape[1:])


# -- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kept", [None, FP8, INT8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("lengths", "T", "heads", "D"),
    [
        ([5000], 1, (24, 8), 128),
        ([3000, 0, 1, 777], 4, (16, 2), 64),
        ([1500, 64], 8, (16, 1), 256),
        ([3000, 17], 16, (24, 8), 128),
    ],
)
def test_gpu_error_is_at_most_twice_that_of_plain_pytorch(lengths, T, heads, D, dtype, kept) -> None:
    q, k, v, counts = make(lengths, T, heads, D, dtype=dtype)
    k, v = k.nan_to_num(), v.nan_to_num()
    scales, plain_k, plain_v = (None, None), k, v
    if kept is not None:
        (k, k_scale), (v, v_scale) = (quantize_kv(x, kept) for x in (k, v))
        scales = (k_scale, v_scale)
        exact_k, exact_v = (x.double() * s[..., None].double() for x, s in ((k, k_scale), (v, v_scale)))
        plain_k, plain_v = exact_k.to(dtype), exact_v.to(dtype)
    else:
        exact_k, exact_v = k.double(), v.double()
    scale = D**-0.5
    expected = decode.naive(q.double(), exact_k, exact_v, counts, None, None, None, scale)
    plain = decode.sdpa(q, plain_k, plain_v, counts, None, None, None, scale)
    found = ours(q, k, v, counts, scales=scales)
    assert error(found, expected) <= max(2 * error(plain, expected), 5e-7)
    pages = [paged(x, 64)[0] for x in (k, v)]
    page_scales = tuple(None if x is None else paged(x, 64)[0] for x in scales)
    assert torch.equal(ours(q, *pages, counts, paged(k, 64)[1], page_scales), found)


@pytest.mark.gpu
@needs_gpu
def test_gpu_graph_follows_the_lengths() -> None:
    q, k, v, lengths = make([4000, 100, 0], 2, (24, 8), 128, S=5000, dtype=torch.bfloat16)
    k, v = k.nan_to_num(1.0), v.nan_to_num(1.0)
    ours(q, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = ours(q, k, v, lengths)
    for new in ([1, 5000, 300], [0, 0, 0], [5000, 5000, 17]):
        lengths.copy_(torch.tensor(new))
        graph.replay()
        assert torch.equal(o, ours(q, k, v, lengths))
        assert error(o, decode.naive(q, k, v, lengths, None, None, None, 128**-0.5)) < 1e-2


@pytest.mark.gpu
@needs_gpu
def test_gpu_offsets_beyond_32_bits() -> None:
    S, H_kv, D = 2**21, 9, 128
    assert S * H_kv * D > 2**31
    q = torch.randn(1, 1, 9, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, S, H_kv, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.tensor([S], device="cuda")
    for heads in (slice(0, 1), slice(8, 9)):
        expected = decode.sdpa(q[:, :, heads], k[:, :, heads], v[:, :, heads], lengths, None, None, None, 0.09)
        assert error(ours(q, k, v, lengths, scale=0.09)[:, :, heads], expected) < 1e-2
