"""A few tokens appended to states in place: equal to the op that makes new states, slots and idle rows included."""

from __future__ import annotations

import os

import pytest
import torch

from oncelm.ops import gated_retention, gated_retention_step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def step(backend, *inputs, slots=None, kept=None):
    if backend == "triton" and INTERPRETED:  # the table offers the kernel on GPUs only
        from oncelm.ops.gated_retention.step_triton import step as kernel

        return kernel(*inputs, slots, kept, inputs[0].shape[-1] ** -0.5)
    return gated_retention_step(*inputs, slots=slots, kept=kept, backend=backend)


def make(N, T, H, K, V, rows):
    generator = torch.Generator().manual_seed(N + T + K)
    q, k, v = (torch.randn(N, T, H, D, generator=generator) for D in (K, K, V))
    g = torch.nn.functional.logsigmoid(torch.randn(N, T, H, generator=generator)) / 4
    return [x.to(DEVICE) for x in (q, k, v, g, torch.randn(rows, H, K, V, generator=generator))]


BACKENDS = ["naive", pytest.param("triton", marks=pytest.mark.skipif(not KERNEL, reason="needs Triton's device"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 16), (3, 16, 48), (2, 24, 64), (1, 128, 32), (1, 128, 128)])
def test_states_change_in_place(backend, T, K, V):
    q, k, v, g, state = make(2, T, 3, K, V, rows=2)
    o, final = gated_retention(q, k, v, g, initial_state=state, output_final_state=True, backend="naive")
    address = state.data_ptr()
    found = step(backend, q, k, v, g, state)
    torch.testing.assert_close(found, o, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(state, final, atol=2e-5, rtol=2e-5)
    assert state.data_ptr() == address


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_that_lie_apart(backend):
    *inputs, state = make(2, 1, 2, 16, 16, rows=5)
    slots, other = torch.tensor([3, 0, 1, 0], device=DEVICE)[::2], state.clone()
    torch.testing.assert_close(step(backend, *inputs, state, slots=slots), step("naive", *inputs, other, slots=slots))
    torch.testing.assert_close(state, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "K"), [(2, 16), (1, 128)])
def test_only_the_slots_of_the_batch_change(backend, T, K):
    q, k, v, g, states = make(3, T, 2, K, K, rows=5)
    slots = torch.tensor([4, -1, 0], device=DEVICE)
    before = states.clone()
    busy = [0, 2]
    o, final = gated_retention(
        *(x[busy] for x in (q, k, v, g)), initial_state=before[[4, 0]], output_final_state=True, backend="naive"
    )
    found = step(backend, q, k, v, g, states, slots=slots)
    torch.testing.assert_close(found[busy], o, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(states[[4, 0]], final, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(states[1:4], before[1:4], atol=0, rtol=0)


def test_slots_of_wider_inputs():
    q, k, v, g, states = make(2, 1, 2, 16, 16, rows=3)
    slots = torch.tensor([2, 0], device=DEVICE)
    wide = states.clone()
    expected = gated_retention_step(q, k, v, g, states, slots=slots, backend="naive")
    found = gated_retention_step(*(x.double() for x in (q, k, v, g)), wide, slots=slots, backend="naive")
    torch.testing.assert_close(found.float(), expected)
    torch.testing.assert_close(wide, states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_leave_no_trace(backend):
    *inputs, states = make(3, 4, 2, 16, 16, rows=5)
    slots, kept, before = [4, 1, 0], [1, 4, 2], states.clone()
    found = step(
        backend, *inputs, states, slots=torch.tensor(slots, device=DEVICE), kept=torch.tensor(kept, device=DEVICE)
    )
    for n, (slot, count) in enumerate(zip(slots, kept, strict=True)):
        own = [x[n : n + 1] for x in inputs]
        o, _ = gated_retention(*own, initial_state=before[[slot]], backend="naive")
        _, final = gated_retention(
            *(x[:, :count] for x in own), initial_state=before[[slot]], output_final_state=True, backend="naive"
        )
        torch.testing.assert_close(found[[n]], o, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(states[[slot]], final, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(states[2:4], before[2:4], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(2, 2, 16, 8)}, "state must be contiguous float32"),
        ({"state": torch.zeros(3, 2, 16, 16)}, "one row a sequence"),
        ({"g": torch.zeros(2, 1, 3)}, "do not fit together"),
        ({"q": torch.zeros(2, 1, 2)}, "do not fit together"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    q, k, v, g, state = make(2, 1, 2, 16, 16, rows=2)
    inputs = {"q": q, "k": k, "v": v, "g": g, "state": state} | {n: x.to(DEVICE) for n, x in change.items()}
    with pytest.raises(ValueError, match=message):
        gated_retention_step(*inputs.values())


def test_slots_must_be_one_a_sequence():
    q, k, v, g, state = make(2, 1, 2, 16, 16, rows=4)
    with pytest.raises(ValueError, match=r"slots must be \[N\]"):
        gated_retention_step(q, k, v, g, state, slots=torch.tensor([0], device=DEVICE))
