"""A few tokens appended to states in place: equal to the op that makes new states."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from oncelm.ops import gated_delta, gated_delta_step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKENDS = ["naive", pytest.param("triton", marks=pytest.mark.skipif(not KERNEL, reason="needs Triton's device"))]


def step(backend, *inputs, slots=None, kept=None):
    if backend == "triton" and INTERPRETED:  # the table offers the kernel on GPUs only
        from oncelm.ops.gated_delta.step_triton import step as kernel

        return kernel(*inputs, slots, kept, inputs[0].shape[-1] ** -0.5)
    return gated_delta_step(*inputs, slots=slots, kept=kept, backend=backend)


def make(N, T, H, K, V, rows=None):
    generator = torch.Generator().manual_seed(N + T + K)
    q, k, v = (torch.randn(N, T, H, D, generator=generator) for D in (K, K, V))
    g, beta = (torch.randn(N, T, H, generator=generator) for _ in range(2))
    state = torch.randn(rows or N, H, K, V, generator=generator)
    return [x.to(DEVICE) for x in (q, F.normalize(k, dim=-1), v, F.logsigmoid(g) / 4, beta.sigmoid(), state)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 16), (3, 16, 48), (2, 24, 64), (1, 128, 32)])
def test_states_change_in_place(backend, T, K, V):
    *inputs, state = make(2, T, 3, K, V)
    o, final = gated_delta(*inputs, initial_state=state, output_final_state=True, backend="naive")
    address = state.data_ptr()
    found = step(backend, *inputs, state)
    torch.testing.assert_close(found, o, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(state, final, atol=2e-5, rtol=2e-5)
    assert state.data_ptr() == address


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [[4, 1, 0], [4, -1, 0]])
def test_only_the_slots_of_the_batch_change(backend, slots):
    *inputs, states = make(3, 2, 2, 16, 16, rows=5)
    before, busy = states.clone(), [n for n, slot in enumerate(slots) if slot >= 0]
    own = [slots[n] for n in busy]
    o, final = gated_delta(
        *(x[busy] for x in inputs), initial_state=before[own], output_final_state=True, backend="naive"
    )
    found = step(backend, *inputs, states, slots=torch.tensor(slots, device=DEVICE))
    torch.testing.assert_close(found[busy], o, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(states[own], final, atol=2e-5, rtol=2e-5)
    others = [slot for slot in range(5) if slot not in own]
    torch.testing.assert_close(states[others], before[others], atol=0, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_holds_the_step(backend):
    *inputs, state = (x.cuda() for x in make(2, 1, 3, 16, 32))
    expected, final = gated_delta(*inputs, initial_state=state, output_final_state=True, backend="naive")
    held = state.clone()
    gated_delta_step(*inputs, held, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gated_delta_step(*inputs, held, backend=backend)
    held.copy_(state)
    graph.replay()
    torch.testing.assert_close(o, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(held, final, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_leave_no_trace(backend):
    *inputs, states = make(3, 4, 2, 16, 16, rows=5)
    slots, kept, before = [4, 1, 0], [1, 4, 2], states.clone()
    found = step(
        backend, *inputs, states, slots=torch.tensor(slots, device=DEVICE), kept=torch.tensor(kept, device=DEVICE)
    )
    for n, (slot, count) in enumerate(zip(slots, kept, strict=True)):
        own = [x[n : n + 1] for x in inputs]
        o, _ = gated_delta(*own, initial_state=before[[slot]], backend="naive")
        _, final = gated_delta(
            *(x[:, :count] for x in own), initial_state=before[[slot]], output_final_state=True, backend="naive"
        )
        torch.testing.assert_close(found[[n]], o, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(states[[slot]], final, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(states[2:4], before[2:4], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("state", torch.zeros(2, 2, 16, 8), "state must be contiguous float32"),
        ("state", torch.zeros(3, 2, 16, 16), "one row a sequence"),
        ("beta", torch.zeros(2, 1, 3), "g and beta .* do not fit together"),
        ("q", torch.zeros(2, 1, 2), "do not fit together"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, wrong, message):
    inputs = dict(zip(("q", "k", "v", "g", "beta", "state"), make(2, 1, 2, 16, 16), strict=True))
    with pytest.raises(ValueError, match=message):
        gated_delta_step(**(inputs | {name: wrong.to(DEVICE)}))
