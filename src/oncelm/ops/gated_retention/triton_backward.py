"""Gated retention in Triton: the kernels of the backward pass. Each gradient is a retention itself (scale s):

    dq = retain(do, v, k) with the state S^T
    dk = s retain(v, do, q) and dv = s retain(k, q, do), both in REVERSE, with the states dS^T and dS:
    dS = exp(G_C) dS' + (exp(G) q)^T do, from the last chunk to the first

and the decay's follows from <S_t, dS_t> = dg_t + k_t . dk_t = q_t . dq_t + dg_{t+1}, which telescopes:

    dg_t = sum_{t <= i <= e} (q_i . dq_i - k_i . dk_i) + <S_e, dS_e>        for any e >= t

Over a long sequence such a sum would drown in rounding, so e is the end of a group of GROUP tokens: the pass for dk
leaves dS there (the marks), the pass for dq multiplies it with S. No [T, T] and no per-chunk state is ever stored.
"""

# mypy: allow-incomplete-defs
# a kernel's arguments are pointers and numbers whose types Triton infers; only its constants are annotated

from __future__ import annotations

import triton
import triton.language as tl

from oncelm.ops.gated_retention.triton_forward import COUNTS, locate, retain


@triton.jit(do_not_specialize=COUNTS)
def key_value_kernel(
    q, k, v, sums, do, dk, dv, states, decays, d_final, d_initial, marks, products, owner, first, cu_seqlens, T, size,
    per_sequence, tokens, scale, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dk by blocks of K and dv by blocks of V; neighbouring programs read the same q, k, v, do.

    states and decays are the gradient's.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (K + V) // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(tl.int64)
    n, begin, length, low, high = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    if d_final is not None:
        d_final += (n * H + h) * (K * V)
    if j < K // BLOCK:
        retain(
            v, do, q, sums, dk, k, products, states, decays, d_final, None, marks + segment * (H * K * V), None, begin,
            length, tokens, segment, low, high, h, j, False, scale, 1.0, H, V, K, BLOCK, C, GROUP, 1, V, True,
        )  # fmt: skip
    else:
        retain(
            k, q, do, sums, dv, None, None, states, decays, d_final, d_initial + (n * H + h) * (K * V), None, None,
            begin, length, tokens, segment, low, high, h, j - K // BLOCK, segment == low, scale, 1.0, H, K, V, BLOCK,
            C, GROUP, V, 1, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    q, k, v, sums, do, dq, states, decays, initial, marks, products, bounds, owner, first, cu_seqlens, T, size,
    per_sequence, tokens, scale, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq by blocks of K, and the inner products <S, dS> at the marks."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = K // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(tl.int64)
    n, begin, length, low, high = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    if initial is not None:
        initial += (n * H + h) * (K * V)
    retain(
        do, v, k, sums, dq, q, products, states, decays, initial, None, marks + segment * (H * K * V),
        bounds + segment * (H * blocks), begin, length, tokens, segment, low, high, h, j, False, 1.0, scale, H, V, K,
        BLOCK, C, GROUP, 1, V, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def decay_kernel(
    query_products, key_products, bounds, dg, owner, first, cu_seqlens, T, size, per_sequence, tokens,
    H: tl.constexpr, QUERY_BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dg_t = sum of q . dq - k . dk from t to the end of its group, plus <S, dS> there; HEADS heads at a time."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    h = pid % blocks * HEADS + tl.arange(0, HEADS)
    slot = pid // blocks % PROGRAMS
    segment = (pid // (blocks * PROGRAMS)).to(tl.int64)
    _, begin, length, _, _ = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    plane = tokens.to(tl.int64) * H
    for group in range(slot, tl.cdiv(length, GROUP), PROGRAMS):
        time = group * GROUP + tl.arange(0, GROUP)
        valid = (time[:, None] < length) & (h[None, :] < H)
        at = (begin + time[:, None]) * H + h[None, :]
        difference = tl.zeros([GROUP, HEADS], dtype=tl.float32)
        for j in tl.static_range(QUERY_BLOCKS):
            difference += tl.load(query_products + j * plane + at, mask=valid, other=0.0)
        for j in tl.static_range(KEY_BLOCKS):
            difference -= tl.load(key_products + j * plane + at, mask=valid, other=0.0)
        mark = begin // GROUP + segment + group
        bound = tl.zeros([HEADS], dtype=tl.float32)
        for j in tl.static_range(QUERY_BLOCKS):
            bound += tl.load(bounds + (mark * H + h) * QUERY_BLOCKS + j, mask=h < H, other=0.0)
        tl.store(dg + at, tl.cumsum(difference, 0, reverse=True) + bound[None, :], mask=valid)
