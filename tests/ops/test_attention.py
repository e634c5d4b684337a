"""Window and global attention against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops import global_attention, window_attention
from oncelm.ops.attention import sdpa


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
