"""The three forms of gated retention agree, with states, packed sequences and gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops import gated_retention, global_attention, window_attention
from oncelm.ops.gated_retention.chunk import CHUNK_SIZE


def make_inputs(
    lengths: list[int], B: int = 1, H: int = 2, K: int = 4, V: int = 6, seed: int = 0, strength: float = 1.0
):
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    q, k, v, g = (
        torch.randn(B, T, H, *tail, generator=generator, dtype=torch.float64) for tail in ((K,), (K,), (V,), ())
    )
    N = B if len(lengths) == 1 else len(lengths)
    state = torch.randn(N, H, K, V, generator=generator, dtype=torch.float64)
    return q, k, v, F.logsigmoid(g) * strength, state


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 300),
    B=st.integers(1, 3),
    strength=st.sampled_from([1 / 16, 1.0, 50.0]),
    backend=st.sampled_from(["chunk", "recurrent"]),
    with_state=st.booleans(),
)
def test_forms_agree(T: int, B: int, strength: float, backend: str, with_state: bool) -> None:
    q, k, v, g, state = make_inputs([T], B=B, strength=strength)
    initial = state if with_state else None
    expected, final = gated_retention(q, k, v, g, initial_state=initial, output_final_state=True, backend="naive")
    got, got_final = gated_retention(q, k, v, g, initial_state=initial, output_final_state=True, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got_final, final, rtol=1e-9, atol=1e-10)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("strength", [1 / 16, 1.0])
@pytest.mark.parametrize(("backend", "T"), [("chunk", 131072), ("recurrent", 2048), ("naive", 2048)])
def test_long_sequences_keep_their_digits(backend: str, T: int, strength: float) -> None:
    """Sums of gates grow with the sequence; what rounding does to their differences must not."""
    inputs = make_inputs([T], H=1, strength=strength)[:4]
    exact, exact_state = gated_retention(*inputs, output_final_state=True, backend="chunk")
    found, state = gated_retention(*(x.float() for x in inputs), output_final_state=True, backend=backend)
    in_a_chunk = CHUNK_SIZE * -inputs[3].mean().item() if backend == "chunk" else 0.0  # its sums of gates
    for got, wanted in ((found, exact), (state, exact_state)):
        assert relative_error(got, wanted) < 5e-7 + 2**-24 * in_a_chunk


@settings(max_examples=30, deadline=None)
@given(T=st.integers(2, 300), cut=st.floats(0, 1), backend=st.sampled_from(["chunk", "recurrent", "naive"]))
def test_two_pieces_make_the_whole(T: int, cut: float, backend: str) -> None:
    q, k, v, g, state = make_inputs([T])
    middle = round(cut * T)
    whole, final = gated_retention(q, k, v, g, initial_state=state, output_final_state=True)
    first, between = gated_retention(
        *(x[:, :middle] for x in (q, k, v, g)), initial_state=state, output_final_state=True, backend=backend
    )
    second, end = gated_retention(
        *(x[:, middle:] for x in (q, k, v, g)), initial_state=between, output_final_state=True, backend=backend
    )
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    torch.testing.assert_close(end, final)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=2, max_size=5), backend=st.sampled_from(["chunk", "recurrent"]))
def test_packed_sequences_are_independent(lengths: list[int], backend: str) -> None:
    q, k, v, g, state = make_inputs(lengths)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    packed, final = gated_retention(
        q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=borders, backend=backend
    )
    assert final is not None
    for n, (start, end) in enumerate(pairwise(borders)):
        alone, alone_final = gated_retention(
            *(x[:, start:end] for x in (q, k, v, g)),
            initial_state=state[n : n + 1],
            output_final_state=True,
            backend="naive",
        )
        torch.testing.assert_close(packed[:, start:end], alone)
        torch.testing.assert_close(final[n : n + 1], alone_final)


def test_packed_equal_lengths_take_one_batch() -> None:
    q, k, v, g, state = make_inputs([7, 7, 7])
    borders = torch.tensor([0, 7, 14, 21])
    packed, final = gated_retention(q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=borders)
    batched, batched_final = gated_retention(
        *(x.unflatten(1, (3, 7))[0] for x in (q, k, v, g)), initial_state=state, output_final_state=True
    )
    torch.testing.assert_close(packed[0], batched.flatten(0, 1))
    torch.testing.assert_close(final, batched_final)


@pytest.mark.parametrize("backend", ["chunk", "recurrent"])
@pytest.mark.parametrize("T", [1, 5, 130])
def test_gradients_agree(T: int, backend: str) -> None:
    gradients = {}
    for name in ("naive", backend):
        inputs = [x.requires_grad_() for x in make_inputs([T], strength=20.0)]
        *qkvg, state = inputs
        o, final = gated_retention(*qkvg, initial_state=state, output_final_state=True, backend=name)
        assert final is not None
        (o.sin().sum() + final.cos().sum()).backward()
        gradients[name] = [x.grad for x in inputs]
    for got, expected in zip(gradients[backend], gradients["naive"], strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_gradcheck_of_the_chunk_form() -> None:
    inputs = [x.requires_grad_() for x in make_inputs([9], H=1, K=2, V=2)]

    def run(q, k, v, g, state):
        return gated_retention(q, k, v, g, initial_state=state, output_final_state=True, backend="chunk")

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_is_that_of_rounding_the_inputs(dtype: torch.dtype) -> None:
    q, k, v, g, _ = make_inputs([500], K=32, V=32, strength=1 / 16)
    exact, _ = gated_retention(q, k, v, g, output_final_state=True, backend="naive")
    rounded = [x.to(dtype) for x in (q, k, v)]
    o, state = gated_retention(*rounded, g.float(), output_final_state=True, backend="chunk")
    of_rounded, _ = gated_retention(*(x.double() for x in rounded), g, backend="naive")
    assert o.dtype == dtype
    assert state is not None
    assert state.dtype == torch.float32
    allowed = 2 * (of_rounded.to(dtype).double() - exact).norm() + 1e-5 * exact.norm()
    assert (o.double() - exact).norm() <= allowed


def test_every_output_is_written() -> None:
    q, k, v, g, _ = make_inputs([131])
    for backend in ("chunk", "recurrent", "naive"):
        assert torch.isfinite(gated_retention(q, k, v, g, backend=backend)[0]).all()


def test_bad_shapes_and_backends() -> None:
    q, k, v, g, state = make_inputs([8])
    with pytest.raises(ValueError, match=r"q and k must both be \[B, T, H, K\]"):
        gated_retention(q, k[:, :-1], v, g)
    with pytest.raises(ValueError, match="v must be"):
        gated_retention(q, k, v[:, :-1], g)
    with pytest.raises(ValueError, match=r"g must be \[B, T, H\]"):
        gated_retention(q, k, v, g[..., None])
    with pytest.raises(ValueError, match=r"initial_state must be \[N, H, K, V\]"):
        gated_retention(q, k, v, g, initial_state=state.mT)
    with pytest.raises(ValueError, match="did you mean 'chunk'"):
        gated_retention(q, k, v, g, backend="chunky")
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens 8"):
        gated_retention(q, k, v, g, cu_seqlens=torch.tensor([0, 9]))


NO_BORDERS = [torch.tensor([], dtype=torch.int32), torch.tensor([0]), torch.tensor(8), torch.tensor([[0, 8]])]


@pytest.mark.parametrize("borders", NO_BORDERS, ids=lambda borders: str(tuple(borders.shape)))
def test_borders_of_no_sequence_are_refused_by_every_op(borders: torch.Tensor) -> None:
    q, k, v, g, _ = make_inputs([8], K=4, V=4)
    message = r"must hold the borders of at least one sequence, a vector \[0, ..., 8\], got shape"
    with pytest.raises(ValueError, match=message):
        gated_retention(q, k, v, g, cu_seqlens=borders)
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, window_size=2, cu_seqlens=borders)
    with pytest.raises(ValueError, match=message):
        global_attention(q, k, v, cu_seqlens=borders)
    with pytest.raises(ValueError, match=f"cu_seqlens_k {message}"):
        global_attention(q, k, v, cu_seqlens=torch.tensor([0, 8]), cu_seqlens_k=borders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_borders_are_integers(dtype: torch.dtype) -> None:
    q, k, v, g, _ = make_inputs([8], K=4, V=4)
    for op in (lambda **options: gated_retention(q, k, v, g, **options), lambda **o: global_attention(q, k, v, **o)):
        with pytest.raises(ValueError, match=f"cu_seqlens must be integers, got {dtype}"):
            op(cu_seqlens=torch.tensor([0, 8]).to(dtype))


def test_packed_sequences_without_a_token() -> None:
    q, k, v, g, state = make_inputs([0, 0], K=4, V=4)
    borders = torch.zeros(3, dtype=torch.int32)
    o, final = gated_retention(q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=borders)
    assert torch.equal(final, state)
    for out in (
        o,
        window_attention(q, k, v, window_size=2, cu_seqlens=borders),
        global_attention(q, k, v, cu_seqlens=borders),
    ):
        assert out.shape == v.shape
