"""The short convolution: PyTorch's own, one token at a time, in pieces and packed are the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.ops import short_convolution, short_convolution_step

D = 5
BACKENDS = ["shifts", "naive"]


def make(T: int, W: int, B: int = 1, N: int | None = None, dtype: torch.dtype = torch.float64):
    """x [B, T, D], weight [D, W], state [N, W - 1, D]."""
    generator = torch.Generator().manual_seed(T + W)
    shapes = (B, T, D), (D, W), (B if N is None else N, W - 1, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "W"), [(0, 4), (1, 4), (2, 4), (9, 4), (9, 1), (9, 2)])
def test_it_is_torchs_convolution_and_silu(T: int, W: int, backend: str) -> None:
    x, weight, state = make(T, W, B=2)
    y, final = short_convolution(x, weight, initial_state=state, output_final_state=True, backend=backend)
    inputs = torch.cat((state, x), dim=1)
    if T:
        torch.testing.assert_close(y, F.silu(F.conv1d(inputs.mT, weight[:, None], groups=D)).mT)
    assert torch.equal(final, inputs[:, T:])
    y, final = short_convolution(x, weight, backend=backend)
    from_zeros, _ = short_convolution(x, weight, initial_state=torch.zeros_like(state), backend=backend)
    assert final is None
    assert torch.equal(y, from_zeros)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), W=st.integers(1, 4), backend=st.sampled_from(BACKENDS)
)
def test_packed_sequences_are_independent(lengths: list[int], W: int, backend: str) -> None:
    x, weight, state = make(sum(lengths), W, N=len(lengths))
    borders = torch.tensor([0, *lengths]).cumsum(0)
    y, final = short_convolution(
        x, weight, initial_state=state, output_final_state=True, cu_seqlens=borders.int(), backend=backend
    )
    assert final is not None
    for n, (start, end) in enumerate(pairwise(borders)):
        alone, alone_final = short_convolution(
            x[:, start:end], weight, initial_state=state[n : n + 1], output_final_state=True, backend="naive"
        )
        torch.testing.assert_close(y[:, start:end], alone)
        torch.testing.assert_close(final[n : n + 1], alone_final)


@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=5), W=st.integers(1, 4))
def test_steps_make_the_whole(pieces: list[int], W: int) -> None:
    x, weight, state = make(sum(pieces), W, B=2)
    whole, final = short_convolution(x, weight, initial_state=state, output_final_state=True)
    address = state.data_ptr()
    parts = [short_convolution_step(part, weight, state) for part in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert torch.equal(state, final)
    assert state.data_ptr() == address


def test_steps_of_states_in_slots() -> None:
    x, weight, state = make(3, 4, B=2)
    held, slots = state.new_zeros(5, *state.shape[1:]), torch.tensor([4, 1])
    held[slots] = state
    y = short_convolution_step(x, weight, held, slots=slots)
    assert torch.equal(y, short_convolution_step(x, weight, state))
    assert torch.equal(held[slots], state)
    assert not held[[0, 2, 3]].any()


def test_drafts_leave_no_trace() -> None:
    x, weight, state = make(6, 4, B=3)
    whole, _ = short_convolution(x, weight, initial_state=state)
    counts, held = [1, 6, 4], state.clone()
    assert torch.equal(short_convolution_step(x, weight, held, kept=torch.tensor(counts)), whole)
    for n, count in enumerate(counts):
        _, final = short_convolution(
            x[n : n + 1, :count], weight, initial_state=state[n : n + 1], output_final_state=True
        )
        assert torch.equal(held[n : n + 1], final)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_agree(packed: bool) -> None:
    gradients = {}
    borders = torch.tensor([0, 4, 4, 5, 12]) if packed else None
    for backend in BACKENDS:
        inputs = [x.requires_grad_() for x in make(12, 4, N=4 if packed else None)]
        x, weight, state = inputs
        y, final = short_convolution(
            x, weight, initial_state=state, output_final_state=True, cu_seqlens=borders, backend=backend
        )
        assert final is not None
        (y.sin().sum() + final.cos().sum()).backward()
        gradients[backend] = [x.grad for x in inputs]
    for got, expected in zip(gradients["shifts"], gradients["naive"], strict=True):
        torch.testing.assert_close(got, expected)


def test_narrow_inputs_are_summed_in_float32() -> None:
    x, weight, _ = make(50, 4, dtype=torch.bfloat16)
    y, final = short_convolution(x, weight, output_final_state=True)
    exact, _ = short_convolution(x.double(), weight.double())
    assert final is not None
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-8, atol=0)


def test_bad_shapes() -> None:
    x, weight, state = make(8, 4)
    with pytest.raises(ValueError, match=r"x must be \[B, T, D\]"):
        short_convolution(x[0], weight)
    with pytest.raises(ValueError, match=r"weight must be \[D, W\]"):
        short_convolution(x, weight.mT)
    with pytest.raises(ValueError, match=r"initial_state must be \[N, W - 1, D\] = \(1, 3, 5\), got \(1, 2, 5\)"):
        short_convolution(x, weight, initial_state=state[:, 1:])
    with pytest.raises(ValueError, match=r"state must be \[S, W - 1, D\]"):
        short_convolution_step(x, weight, state[:, 1:])
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens 8"):
        short_convolution(x, weight, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="did you mean 'shifts'"):
        short_convolution(x, weight, backend="shift")
