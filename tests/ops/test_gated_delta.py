"""The forms of the gated delta rule agree, with states, packed sequences and gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops import gated_delta, gated_retention
from oncelm.ops.gated_delta.chunk import CHUNK_SIZE

FORMS = ["chunk", "recurrent"]


def make_inputs(
    lengths: list[int], B: int = 1, H: int = 2, K: int = 4, V: int = 6, seed: int = 0, strength: float = 1.0
):
    """q, k, v, g, beta, and a state of each sequence; keys have length 1."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    q, k, v, g, beta = (
        torch.randn(B, T, H, *tail, generator=generator, dtype=torch.float64) for tail in ((K,), (K,), (V,), (), ())
    )
    N = B if len(lengths) == 1 else len(lengths)
    state = torch.randn(N, H, K, V, generator=generator, dtype=torch.float64)
    return q, F.normalize(k, dim=-1), v, F.logsigmoid(g) * strength, beta.sigmoid(), state


@settings(max_examples=15, deadline=None)
@given(
    T=st.integers(0, 2 * CHUNK_SIZE + 5),
    B=st.integers(1, 3),
    strength=st.sampled_from([1 / 16, 1.0, 50.0]),
    backend=st.sampled_from(FORMS),
    with_state=st.booleans(),
)
def test_forms_agree(T: int, B: int, strength: float, backend: str, with_state: bool) -> None:
    *inputs, state = make_inputs([T], B=B, strength=strength)
    initial = state if with_state else None
    expected, final = gated_delta(*inputs, initial_state=initial, output_final_state=True, backend="naive")
    got, got_final = gated_delta(*inputs, initial_state=initial, output_final_state=True, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got_final, final, rtol=1e-9, atol=1e-10)


def test_writing_in_full_without_decay_is_a_dictionary() -> None:
    """With beta 1 and g 0, what a key wrote last is what a query of that key reads."""
    keys, values = torch.eye(4)[[0, 1, 2, 1]], torch.arange(8.0).view(4, 2)
    q, k, v = (x[None, :, None] for x in (torch.eye(4)[[0, 0, 1, 1]], keys, values))
    gates = torch.zeros(1, 4, 1)
    for backend in ("naive", *FORMS):
        o, _ = gated_delta(q, k, v, gates, gates + 1, scale=1.0, backend=backend)
        torch.testing.assert_close(o[0, :, 0], values[[0, 0, 1, 3]])


def test_without_erasing_it_is_gated_retention() -> None:
    """Keys that are all orthogonal erase nothing."""
    q, _, v, g, _, state = make_inputs([4])
    k = torch.eye(4, dtype=torch.float64)[None, :, None].expand(q.shape)
    o, final = gated_delta(q, k, v, g, torch.ones_like(g), output_final_state=True, backend="chunk")
    expected, of_retention = gated_retention(q, k, v, g, scale=1.0, output_final_state=True, backend="naive")
    torch.testing.assert_close(o, expected * q.shape[-1] ** -0.5)
    torch.testing.assert_close(final, of_retention)
    assert not torch.equal(gated_delta(q, k, v, g, torch.ones_like(g), initial_state=state)[0], o)


@pytest.mark.parametrize("strength", [1 / 16, 1.0])
@pytest.mark.parametrize(("backend", "T"), [("chunk", 32768), ("recurrent", 2048), ("naive", 2048)])
def test_long_sequences_keep_their_digits(backend: str, T: int, strength: float) -> None:
    inputs = make_inputs([T], H=1, strength=strength)[:5]
    exact, exact_state = gated_delta(*inputs, output_final_state=True, backend="chunk")
    found, state = gated_delta(*(x.float() for x in inputs), output_final_state=True, backend=backend)
    assert exact_state is not None
    assert state is not None
    in_a_chunk = CHUNK_SIZE * -inputs[3].mean().item() if backend == "chunk" else 0.0  # its sums of gates
    for got, wanted in ((found, exact), (state, exact_state)):
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        assert error < 5e-7 + 2**-24 * in_a_chunk


@settings(max_examples=12, deadline=None)
@given(T=st.integers(2, 150), cut=st.floats(0, 1), backend=st.sampled_from([*FORMS, "naive"]))
def test_two_pieces_make_the_whole(T: int, cut: float, backend: str) -> None:
    *inputs, state = make_inputs([T])
    middle = round(cut * T)
    whole, final = gated_delta(*inputs, initial_state=state, output_final_state=True)
    first, between = gated_delta(
        *(x[:, :middle] for x in inputs), initial_state=state, output_final_state=True, backend=backend
    )
    second, end = gated_delta(
        *(x[:, middle:] for x in inputs), initial_state=between, output_final_state=True, backend=backend
    )
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    torch.testing.assert_close(end, final)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(0, 100), min_size=2, max_size=4), backend=st.sampled_from(FORMS))
def test_packed_sequences_are_independent(lengths: list[int], backend: str) -> None:
    *inputs, state = make_inputs(lengths)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    options = {"initial_state": state, "output_final_state": True}
    packed, final = gated_delta(*inputs, **options, cu_seqlens=borders, backend=backend)
    assert final is not None
    for n, (start, end) in enumerate(pairwise(borders)):
        options["initial_state"] = state[n : n + 1]
        alone, alone_final = gated_delta(*(x[:, start:end] for x in inputs), **options, backend="naive")
        torch.testing.assert_close(packed[:, start:end], alone)
        torch.testing.assert_close(final[n : n + 1], alone_final)


def test_packed_sequences_without_a_token() -> None:
    *inputs, state = make_inputs([0, 0])
    borders = torch.zeros(3, dtype=torch.int32)
    o, final = gated_delta(*inputs, initial_state=state, output_final_state=True, cu_seqlens=borders)
    assert torch.equal(final, state)
    assert o.shape == inputs[2].shape


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("T", [1, 5, CHUNK_SIZE + 2])
def test_gradients_agree(T: int, backend: str) -> None:
    gradients = {}
    for name in ("naive", backend):
        inputs = [x.requires_grad_() for x in make_inputs([T], strength=20.0)]
        o, final = gated_delta(*inputs[:5], initial_state=inputs[5], output_final_state=True, backend=name)
        assert final is not None
        (o.sin().sum() + final.cos().sum()).backward()
        gradients[name] = [x.grad for x in inputs]
    for got, expected in zip(gradients[backend], gradients["naive"], strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_gradcheck_of_the_chunk_form() -> None:
    inputs = [x.requires_grad_() for x in make_inputs([9], H=1, K=2, V=2)]

    def run(q, k, v, g, beta, state):
        return gated_delta(q, k, v, g, beta, initial_state=state, output_final_state=True, backend="chunk")

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_is_that_of_rounding_the_inputs(dtype: torch.dtype) -> None:
    *inputs, _ = make_inputs([300], K=32, V=32, strength=1 / 16)
    exact, _ = gated_delta(*inputs, backend="chunk")
    rounded = [x.to(dtype) for x in inputs[:3]]
    o, state = gated_delta(*rounded, *(x.float() for x in inputs[3:]), output_final_state=True)
    of_rounded, _ = gated_delta(*(x.double() for x in rounded), *inputs[3:])
    assert o.dtype == dtype
    assert state is not None
    assert state.dtype == torch.float32
    allowed = 2 * (of_rounded.to(dtype).double() - exact).norm() + 1e-5 * exact.norm()
    assert (o.double() - exact).norm() <= allowed


def test_autocast_keeps_states_and_systems_in_float32() -> None:
    *inputs, state = (x.float() for x in make_inputs([100], K=16, V=16))
    exact, final = gated_delta(*inputs, initial_state=state, output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, rounded = gated_delta(*inputs, initial_state=state, output_final_state=True)
    assert rounded is not None
    assert (o.dtype, rounded.dtype) == (torch.float32, torch.float32)
    for got, wanted in ((o, exact), (rounded, final)):
        assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_every_output_is_written() -> None:
    *inputs, _ = make_inputs([131])
    for backend in ("naive", *FORMS):
        assert torch.isfinite(gated_delta(*inputs, backend=backend)[0]).all()


def test_bad_shapes_and_backends() -> None:
    q, k, v, g, beta, state = make_inputs([8])
    with pytest.raises(ValueError, match=r"q and k must both be \[B, T, H, K\]"):
        gated_delta(q, k[:, :-1], v, g, beta)
    with pytest.raises(ValueError, match="v must be"):
        gated_delta(q, k, v[:, :-1], g, beta)
    with pytest.raises(ValueError, match=r"g must be \[B, T, H\]"):
        gated_delta(q, k, v, g[..., None], beta)
    with pytest.raises(ValueError, match=r"beta must be \[B, T, H\]"):
        gated_delta(q, k, v, g, beta[..., None])
    with pytest.raises(ValueError, match=r"initial_state must be \[N, H, K, V\]"):
        gated_delta(q, k, v, g, beta, initial_state=state.mT)
    with pytest.raises(ValueError, match="did you mean 'chunk'"):
        gated_delta(q, k, v, g, beta, backend="chunky")
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens 8"):
        gated_delta(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="batch size 1"):
        gated_delta(*make_inputs([8], B=2)[:5], cu_seqlens=torch.tensor([0, 8]))
