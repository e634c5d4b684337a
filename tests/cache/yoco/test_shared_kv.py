"""The shared keys and values: stored in 8 bits, and at positions that only the device knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oncelm.ops.dispatch as dispatch
from oncelm.cache import SharedKV, load_snapshot, save_snapshot
from oncelm.ops import dequantize_kv, global_attention
from tests.models.small import VOCAB, make_model

FP8, INT8 = torch.float8_e4m3fn, torch.int8
EIGHT_BITS = pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
CPU = torch.device("cpu")

# of the logits, on small models with random weights; measured: float8 0.0011 to 0.0046, int8 0.0003 to 0.0010
LOGIT_ERRORS = {FP8: 0.01, INT8: 0.0025}
KINDS = ("retention", "window", "interleaved", "unstacked", "llama-like")


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@EIGHT_BITS
@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_near_the_full_cache(kind: str, dtype: torch.dtype) -> None:
    """Prefill, single tokens, a few at once, many at once; padded rows too."""
    model, tokens = make_model(kind), ids(2, 60)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    for attention_mask in (None, mask):
        results = []
        for stored in (dtype, torch.float32):
            cache = model.new_cache(2, 60, dtype=stored)
            start = None if attention_mask is None else attention_mask[:, :20]
            pieces = [model.prefill(tokens[:, :20], cache, chunk_size=9, attention_mask=start)[:, None]]
            pieces += [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(20, 25)]
            pieces += [model(part, past_key_values=cache).logits for part in tokens[:, 25:].split((4, 31), dim=1)]
            results.append(torch.cat(pieces, dim=1))
        stored, exact = results
        assert stored.dtype == torch.float32
        assert (stored - exact).norm() < LOGIT_ERRORS[dtype] * exact.norm()


@EIGHT_BITS
def test_bytes_are_a_byte_a_number_and_a_scale_a_vector(dtype: torch.dtype) -> None:
    model = make_model("window")
    config, S = model.config, 1000
    heads, D = config.num_key_value_heads, config.head_dim
    windows = 2 * 2 * config.window_size * config.self_kv_heads * config.self_head_dim * 4
    assert model.new_cache(3, S, dtype=dtype).nbytes() == 3 * (2 * S * heads * (D + 4) + windows)


@EIGHT_BITS
@settings(max_examples=10, deadline=None)
@given(first=st.integers(1, 300), second=st.integers(1, 9), rows=st.lists(st.integers(0, 1), min_size=1, max_size=3))
def test_growing_snapshots_and_rows(dtype: torch.dtype, first: int, second: int, rows: list[int]) -> None:
    model = make_model("retention")
    cache = model.new_cache(2, dtype=dtype)
    model.prefill(ids(2, first), cache)
    point = cache.snapshot()
    expected = model(ids(2, second, seed=1), past_key_values=cache).logits
    for target in (cache, model.new_cache(2, 400, dtype=dtype)):
        target.restore(point)
        torch.testing.assert_close(model(ids(2, second, seed=1), past_key_values=target).logits, expected)
    cache.restore(point)
    cache.select(rows)
    got = model(ids(2, second, seed=1)[rows], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[rows])


@EIGHT_BITS
def test_files(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("retention")
    cache = model.new_cache(1, 40, dtype=dtype)
    model.prefill(ids(1, 30), cache)
    save_snapshot(cache.snapshot(), tmp_path / "cache", model.fingerprint())
    expected = model(ids(1, 5, seed=1), past_key_values=cache).logits
    other = model.new_cache(1, 40, dtype=dtype)
    other.restore(load_snapshot(tmp_path / "cache", model.fingerprint()))
    assert torch.equal(model(ids(1, 5, seed=1), past_key_values=other).logits, expected)


def test_a_snapshot_of_another_width_is_refused() -> None:
    model = make_model("retention")
    dtypes = (torch.float32, FP8, INT8)
    snapshots = {}
    for dtype in dtypes:
        cache = model.new_cache(1, 40, dtype=dtype)
        model.prefill(ids(1, 30), cache)
        snapshots[dtype] = cache.snapshot()
    for dtype in dtypes:
        for saved, snapshot in snapshots.items():
            if saved != dtype:
                with pytest.raises(ValueError, match=f"keys and values are {saved}, the cache's {dtype}"):
                    model.new_cache(1, 40, dtype=dtype).restore(snapshot)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype of a cache torch.uint8; did you mean 'torch.int8'"):
        make_model("retention").new_cache(1, 10, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, FP8, INT8], ids=str)
def test_positions_on_the_device(dtype: torch.dtype) -> None:
    """store_at and attend_at against attention over what was stored."""
    shared = SharedKV(3, 30, 2, 8, dtype, CPU)
    k, v = draw(3, 20, 2, 8), draw(3, 20, 2, 8, seed=1)
    starts = torch.tensor([0, 5, 9])
    for first, length in ((0, 14), (14, 4), (18, 1), (19, 1)):
        positions = starts[:, None] + torch.arange(first, first + length)
        shared.store_at(k[:, first : first + length], v[:, first : first + length], positions)
    q = draw(3, 4, 4, 8, seed=2)
    positions = starts[:, None] + torch.arange(16, 20)
    found = shared.attend_at(q, positions[:, -1] + 1)
    if shared.is_quantised:
        held_k, held_v = (
            dequantize_kv(values, scales, torch.float32)
            for values, scales in ((shared.k, shared.k_scale), (shared.v, shared.v_scale))
        )
        own = positions[:, 3:]
        assert (held_k[torch.arange(3)[:, None], own] - k[:, 19:]).abs().max() < 0.15
    else:
        held_k, held_v = shared.k, shared.v
        assert torch.equal(held_k[2, 9:29], k[2])
    expected = global_attention(q, held_k, held_v, positions=positions)
    torch.testing.assert_close(found, expected)


@EIGHT_BITS
@settings(max_examples=20, deadline=None)
@given(data=st.data(), P=st.integers(9, 30))
def test_any_positions_of_many_queries(dtype: torch.dtype, data: st.DataObject, P: int) -> None:
    """Subsets of positions give the logits of all positions."""
    model = make_model("retention")
    columns = torch.tensor(data.draw(st.lists(st.integers(0, 29), min_size=1, max_size=P, unique=True)))
    tokens = ids(2, 40)
    logits = []
    for keep in (None, columns):
        cache = model.new_cache(2, 40, dtype=dtype)
        model.prefill(tokens[:, :10], cache)
        logits.append(model(tokens[:, 10:], past_key_values=cache, logits_to_keep=keep).logits)
    torch.testing.assert_close(logits[1], logits[0][:, columns], rtol=1e-4, atol=1e-4)


def test_a_kernel_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One to sixteen new tokens go to decode_attention's kernel, with and without quantisation; more do not."""
    calls = []
    table = dispatch.TABLE["decode_attention"]

    def attend(q, *rest):
        calls.append(q.shape[1])
        return table[1].load()(q, *rest)

    row = dispatch.Implementation("triton", "oncelm.ops.attention.decode:kernel", ("cpu",), "a stand-in")
    monkeypatch.setattr("oncelm.ops.attention.decode.kernel", attend, raising=False)
    monkeypatch.setitem(dispatch.TABLE, "decode_attention", (row, *table))
    model, tokens = make_model("retention", hidden_size=64), ids(2, 30)  # heads of 16
    expected = model(tokens, use_cache=False).logits
    cache = model.new_cache(2, 30)
    found = [model(part, past_key_values=cache).logits for part in tokens.split((17, 1, 10, 2), dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
    assert calls == [1, 1, 10, 10, 2, 2]
    model = make_model("retention")  # heads of 8: too small for the kernel
    cache = model.new_cache(2, 30)
    for part in tokens.split((10, 20), dim=1):
        model.prefill(part, cache)
    assert len(calls) == 6


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, FP8, INT8], ids=str)
def test_gpu_decoding_in_a_graph(dtype: torch.dtype) -> None:
    """A captured store_at and attend_at serve every later token."""
    N, S, H, H_kv, D = 2, 300, 6, 2, 64
    shared = SharedKV(N, S, H_kv, D, dtype, torch.device("cuda"))
    q, k, v = (draw(N, 40, heads, D, seed=heads).cuda() for heads in (H, H_kv, H_kv))
    positions = torch.tensor([[0], [100]], device="cuda")
    one = [x[:, :1].clone() for x in (q, k, v)]

    def step() -> torch.Tensor:
        shared.store_at(one[1], one[2], positions)
        return shared.attend_at(one[0], positions[:, -1] + 1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for t in range(40):
        for held, x in zip(one, (q, k, v), strict=True):
            held.copy_(x[:, t : t + 1])
        graph.replay()
        torch.testing.assert_close(out, shared.attend_at(one[0], positions[:, -1] + 1))
        positions += 1
    first = SharedKV(N, S, H_kv, D, dtype, torch.device("cuda"))
    first.store_at(k, v, torch.arange(40, device="cuda").expand(N, 40))
    expected = first.attend_at(q[:, -1:], torch.tensor([40, 40], device="cuda"))
    torch.testing.assert_close(out[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@gpu
@EIGHT_BITS
def test_gpu_logits_stay_near_the_full_cache(dtype: torch.dtype) -> None:
    model = make_model("retention", hidden_size=128, num_attention_heads=4).cuda()
    tokens = ids(2, 200).cuda()
    expected = model(tokens, use_cache=False).logits
    cache = model.new_cache(2, 200, dtype=dtype)
    found = [model(part, past_key_values=cache).logits for part in tokens.split((100, 1, 5, 1, 93), dim=1)]
    assert (torch.cat(found, 1) - expected).norm() < LOGIT_ERRORS[dtype] * expected.norm()
