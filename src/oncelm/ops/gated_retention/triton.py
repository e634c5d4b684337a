"""Gated retention on a GPU: plans, launches and the custom ops (kernels in triton_forward.py, triton_backward.py,
their compiled forms in triton_configs.py).

`chunk` has the signature of the portable form plus native packed sequences. It calls the operator
`oncelm::gated_retention`, whose gradient is `oncelm::gated_retention_backward`; both are opaque to torch.compile and
have shape functions, so a compiled or sharded model keeps one graph. Under TRITON_INTERPRET=1 all of it runs on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton

from oncelm.ops import gpu
from oncelm.ops.gated_retention import chunk as portable
from oncelm.ops.gated_retention import triton_backward, triton_forward
from oncelm.ops.gated_retention.triton_configs import config, group_size, hopper
from oncelm.ops.packed import by_sequence

Tensor = torch.Tensor
Added = tuple[Tensor, Tensor] | tuple[None, None]  # what `segment_states` gives, or that each sequence is one segment
Sums = dict[int, torch.Tensor]  # chunk size -> [H, tokens] running sums of g inside chunks of that size

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_DIM, LARGEST_DIM = 16, 256
SHORTEST_SEGMENT = 1024  # tokens; below, a segment's start and end cost more than running it in parallel gains
SMALL_PROGRAMS = 4096  # of the kernels that only read gates: enough to fill the device


def segment_size(q: Tensor, v: Tensor, sequences: int) -> int:
    """Tokens a segment: a whole sequence where sequences, heads and blocks fill the device, else a part of it.

    Fewer, longer segments are better (each costs a state), an idle multiprocessor is worse: with p programs a
    sequence-wide pass and room for r at once, s segments cost ceil(p s / r) / s, and half as much again if s > 1.
    """
    B, T, H, _ = q.shape
    group = group_size(q, v)
    whole = max(group, -(-T // group) * group)
    if q.device.type != "cuda":
        return whole
    chosen = config("forward", q, v)
    programs = sequences * H * (v.shape[-1] // chosen.block)
    room = gpu.multiprocessors(q.device.index) * (8 // chosen.num_warps)
    cost = {s: -(-programs * s // room) / s * (1.5 if s > 1 else 1.0) for s in range(1, 65)}
    segments = min(cost, key=cost.__getitem__)
    length = B * T // sequences if sequences else T
    return min(whole, max(SHORTEST_SEGMENT, -(-length // (segments * group)) * group))


@dataclass(frozen=True)
class Plan:
    """How the tokens are cut. `tables` (owner, first, cu_seqlens) are read for packed sequences only."""

    sequences: int
    segments: int
    size: int
    per_sequence: int
    T: int
    tables: tuple[Tensor | None, Tensor | None, Tensor | None]

    @property
    def several(self) -> bool:
        """Whether a sequence may have more than one segment; if not, segment n is sequence n."""
        return self.segments > self.sequences

    @property
    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments that say how the tokens are cut."""
        owner, first, cu_seqlens = self.tables
        return {
            "owner": owner,
            "first": first,
            "cu_seqlens": cu_seqlens,
            "T": self.T,
            "size": self.size,
            "per_sequence": self.per_sequence,
            "PACKED": cu_seqlens is not None,
        }


def count_segments(B: int, T: int, sequences: int | None, size: int) -> int:
    """Segments of B sequences of T tokens, or a bound for `sequences` packed ones that needs no look at cu_seqlens."""
    return B * max(1, -(-T // size)) if sequences is None else T // size + sequences


def plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, size: int = 0) -> Plan:
    """Segments of `size` tokens (0: chosen). For packed sequences a few small launches build, without a wait,

    `first` [N + 1], the first segment of each sequence (an empty one has one segment too), and `owner` [segments], the
    sequence of each segment; spare segments belong to the last sequence and have length 0. Nobody has looked at the
    values of cu_seqlens, so they are forced to rise from 0 to T: wrong ones give wrong results, never a wild access.
    """
    B, T = q.shape[:2]
    if cu_seqlens is None:
        size = size or segment_size(q, v, B)
        per_sequence = max(1, -(-T // size))
        return Plan(B, B * per_sequence, size, per_sequence, T, (None, None, None))
    sequences = cu_seqlens.numel() - 1
    size = size or segment_size(q, v, sequences)
    cu_seqlens = cu_seqlens.to(q.device, torch.int64).clamp(0, T).cummax(0).values
    segments = count_segments(B, T, sequences, size)
    counts = (cu_seqlens.diff() + (size - 1)).div_(size, rounding_mode="floor").clamp_(min=1)
    first = F.pad(counts.cumsum(0), (1, 0))
    owner = torch.searchsorted(first, torch.arange(segments, device=q.device), right=True)
    owner = owner.sub_(1).clamp_(max=sequences - 1)
    return Plan(sequences, segments, size, 1, T, (owner, first, cu_seqlens))


def chunk_sums(g: Tensor, kernels: tuple[str, ...], q: Tensor, v: Tensor, cut: Plan) -> Sums:
    """Running sums of g for each chunk size that the kernels named use."""
    B, T, H = g.shape
    heads = min(16, triton.next_power_of_2(H))
    found = {}
    for size in {config(kernel, q, v).chunk for kernel in kernels}:
        found[size] = g.new_empty(H, B * T)
        programs = max(1, min(-(-cut.size // size), SMALL_PROGRAMS // cut.segments))
        triton_forward.sums_kernel[(cut.segments * programs * -(-H // heads),)](
            g, found[size], **cut.arguments, tokens=B * T, H=H, HEADS=heads, C=size, PROGRAMS=programs, num_warps=4
        )
    return found


def segment_states(b: Tensor, c: Tensor, sums: Sums, scale: float, cut: Plan, reverse: bool) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state [segments, H, K, V], and its decay [segments, H], float32.

    reverse: to the state's gradient.
    """
    _, _, H, K = b.shape
    V = c.shape[-1]
    states = b.new_empty(cut.segments, H, K, V, dtype=torch.float32)
    decays = b.new_empty(cut.segments, H, dtype=torch.float32)
    form = config("states", b, c)
    triton_forward.states_kernel[(cut.segments * H * (V // form.block),)](
        b, c, sums[form.chunk], states, decays, **cut.arguments, tokens=b.shape[0] * b.shape[1], write_scale=scale,
        H=H, A=K, N=V, REVERSE=reverse, **form.launch,
    )  # fmt: skip
    return states, decays


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, sums: Sums, o: Tensor, added: Added, initial: Tensor | None,
    final: Tensor, scale: float, cut: Plan,
) -> None:  # fmt: skip
    """o and the final states."""
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    form = config("forward", q, v)
    kernels: Any = triton_forward if form.num_stages else hopper
    kernels.forward_kernel[(cut.segments * H * (V // form.block),)](
        q, k, v, sums[form.chunk], o, *added, initial, final, **cut.arguments, tokens=q.shape[0] * q.shape[1],
        scale=scale, H=H, K=K, V=V, **form.launch,
    )  # fmt: skip


def launch_key_value(
    q: Tensor, k: Tensor, v: Tensor, sums: Sums, do: Tensor, dk: Tensor, dv: Tensor, d_added: Added,
    d_final: Tensor | None, d_initial: Tensor, marks: Tensor, products: Tensor, scale: float, cut: Plan,
) -> None:  # fmt: skip
    """dk, dv, the initial states' gradient, the marks and k . dk."""
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    form = config("key_value", q, v)
    kernels: Any = triton_backward if form.num_stages else hopper
    kernels.key_value_kernel[(cut.segments * H * ((K + V) // form.block),)](
        q, k, v, sums[form.chunk], do, dk, dv, *d_added, d_final, d_initial, marks, products, **cut.arguments,
        tokens=q.shape[0] * q.shape[1], scale=scale, H=H, K=K, V=V, GROUP=group_size(q, v), **form.launch,
    )  # fmt: skip


def launch_query(
    q: Tensor, k: Tensor, v: Tensor, sums: Sums, do: Tensor, dq: Tensor, added: Added, initial: Tensor | None,
    marks: Tensor, products: Tensor, bounds: Tensor, scale: float, cut: Plan,
) -> None:  # fmt: skip
    """dq, q . dq and <S, dS> at the marks."""
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    form = config("query", q, v)
    kernels: Any = triton_backward if form.num_stages else hopper
    kernels.query_kernel[(cut.segments * H * (K // form.block),)](
        q, k, v, sums[form.chunk], do, dq, *added, initial, marks, products, bounds, **cut.arguments,
        tokens=q.shape[0] * q.shape[1], scale=scale, H=H, K=K, V=V, GROUP=group_size(q, v), **form.launch,
    )  # fmt: skip


def launch_decay(
    query_products: Tensor, key_products: Tensor, bounds: Tensor, dg: Tensor, group: int, cut: Plan
) -> None:
    """dg from the products of the two passes."""
    H = dg.shape[2]
    heads = min(8, triton.next_power_of_2(H))
    programs = max(1, min(-(-cut.size // group), SMALL_PROGRAMS // cut.segments))
    triton_backward.decay_kernel[(cut.segments * programs * -(-H // heads),)](
        query_products, key_products, bounds, dg, **cut.arguments, tokens=dg.shape[0] * dg.shape[1], H=H,
        QUERY_BLOCKS=query_products.shape[0], KEY_BLOCKS=key_products.shape[0], HEADS=heads, GROUP=group,
        PROGRAMS=programs, num_warps=4,
    )  # fmt: skip


def mark_count(tokens: int, group: int, segments: int) -> int:
    """Groups of at most `group` tokens that `segments` segments of `tokens` tokens in all can hold."""
    return tokens // group + segments


FORWARD = "(Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor? initial_state, Tensor? cu_seqlens, int size)"
BACKWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor? initial_state, Tensor? cu_seqlens, int size, "
    "Tensor states, Tensor decays, Tensor d_o, Tensor? d_final)"
)


def _forward(q, k, v, g, scale, initial_state, cu_seqlens, size):
    """o, the final state of each sequence, and what `segment_states` gives (empty if a sequence is one segment)."""
    with gpu.on(q):
        cut = plan(q, v, cu_seqlens, size)
        o = torch.empty_like(v)
        final = q.new_empty(cut.sequences, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
        sums = chunk_sums(g, ("states", "forward") if cut.several else ("forward",), q, v, cut)
        added: Added = segment_states(k, v, sums, scale, cut, reverse=False) if cut.several else (None, None)
        launch_forward(q, k, v, sums, o, added, initial_state, final, scale, cut)
    states, decays = (final.new_empty(0) if x is None else x for x in added)
    return o, final, states, decays


def _backward(q, k, v, g, scale, initial_state, cu_seqlens, size, states, decays, d_o, d_final):
    """dq, dk, dv, dg and the initial states' gradient."""
    with gpu.on(q):
        B, T, H, K = q.shape
        V = v.shape[-1]
        cut = plan(q, v, cu_seqlens, size)
        group = group_size(q, v)
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, g))
        d_initial = g.new_empty(cut.sequences, H, K, V)
        count = mark_count(B * T, group, cut.segments)
        marks = q.new_empty(count, H, K, V)
        query_blocks, key_blocks = (K // config(kernel, q, v).block for kernel in ("query", "key_value"))
        query_products, key_products = g.new_empty(query_blocks, B, T, H), g.new_empty(key_blocks, B, T, H)
        bounds = g.new_empty(count, H, query_blocks)
        sums = chunk_sums(g, ("states", "key_value", "query"), q, v, cut)
        added: Added = (states, decays) if cut.several else (None, None)
        d_added: Added = segment_states(q, d_o, sums, 1.0, cut, reverse=True) if cut.several else (None, None)
        launch_key_value(q, k, v, sums, d_o, dk, dv, d_added, d_final, d_initial, marks, key_products, scale, cut)
        launch_query(q, k, v, sums, d_o, dq, added, initial_state, marks, query_products, bounds, scale, cut)
        launch_decay(query_products, key_products, bounds, dg, group, cut)
    return dq, dk, dv, dg, d_initial


def _forward_shapes(q, k, v, g, scale, initial_state, cu_seqlens, size):
    B, T, H, K = q.shape
    V = v.shape[-1]
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sequences = B if packed is None else packed
    final = q.new_empty(sequences, H, K, V, dtype=torch.float32)
    segments = count_segments(B, T, packed, size or segment_size(q, v, sequences))
    if segments == sequences:
        return torch.empty_like(v), final, final.new_empty(0), final.new_empty(0)
    return torch.empty_like(v), final, final.new_empty(segments, H, K, V), final.new_empty(segments, H)


def _backward_shapes(q, k, v, g, scale, initial_state, cu_seqlens, size, states, decays, d_o, d_final):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_initial = g.new_empty(sequences, q.shape[2], q.shape[3], v.shape[3])
    return (*(torch.empty_like(x) for x in (q, k, v, g)), d_initial)


forward_op = torch.library.custom_op(
    "oncelm::gated_retention", _forward, mutates_args=(), schema=f"{FORWARD} -> (Tensor, Tensor, Tensor, Tensor)"
)
backward_op = torch.library.custom_op(
    "oncelm::gated_retention_backward",
    _backward,
    mutates_args=(),
    schema=f"{BACKWARD} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
forward_op.register_fake(_forward_shapes)
backward_op.register_fake(_backward_shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, scale, initial_state, cu_seqlens, size = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, *output[2:])
    ctx.scale, ctx.size = scale, size
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_o, d_final, *_):
    q, k, v, g, initial_state, cu_seqlens, states, decays = ctx.saved_tensors
    d_o = torch.zeros_like(v) if d_o is None else d_o.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    dq, dk, dv, dg, d_initial = backward_op(
        q, k, v, g, ctx.scale, initial_state, cu_seqlens, ctx.size, states, decays, d_o, d_final
    )
    return dq, dk, dv, dg, None, None if initial_state is None else d_initial, None, None


forward_op.register_autograd(_gradients, setup_context=_save)


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    segment: int = 0,
) -> tuple[Tensor, Tensor]:
    """The chunkwise form: q, k [B, T, H, K], v [B, T, H, V], g [B, T, H], state [N, H, K, V] -> o, final state.

    cu_seqlens: [N + 1], sequences packed along T (B is 1), handled by the kernels; empty ones are allowed.
    segment: tokens that one program walks over; 0 chooses it so that the programs fill the device.
    K and V that are not 16, 32, 64, 128 or 256 are padded with zeros; float64 and larger ones run the PyTorch form.
    """
    K, V = q.shape[-1], v.shape[-1]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if dtype not in DTYPES or max(K, V) > LARGEST_DIM:
        return by_sequence(portable.chunk, (q, k, v, g), (scale,), initial_state, cu_seqlens)
    padded_k, padded_v = (max(SMALLEST_DIM, triton.next_power_of_2(D)) for D in (K, V))
    q, k = (F.pad(x, (0, padded_k - K)) if padded_k > K else x for x in (q, k))
    v = F.pad(v, (0, padded_v - V)) if padded_v > V else v
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    g = g.float().contiguous()
    if initial_state is not None:
        initial_state = initial_state.float()
        if (padded_k, padded_v) != (K, V):
            initial_state = F.pad(initial_state, (0, padded_v - V, 0, padded_k - K))
        initial_state = initial_state.contiguous()
    o, final_state, *_ = forward_op(q, k, v, g, scale, initial_state, cu_seqlens, segment)
    return o[..., :V], final_state[..., :K, :V]
