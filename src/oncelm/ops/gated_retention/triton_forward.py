"""Gated retention in Triton: the pass over a segment that every kernel shares, and the kernels of the forward pass.

A sequence is cut into *segments* that run in parallel; inside one, a program walks over chunks of C tokens and keeps a
block of columns of the state in registers. `sums_kernel` prepares the decays. Where a sequence has several segments,
`states_kernel` sums what each adds to the state and `scan_kernel` turns the sums into the state before each segment;
`forward_kernel` then reads q, k and v and writes o. Token offsets are 64-bit and every grid is one-dimensional, so
neither T nor T x H x D is bounded. A product has its operands in the inputs' dtype and its sum in float32.
"""

# mypy: allow-incomplete-defs
# a kernel's arguments are pointers and numbers whose types Triton infers; only its constants are annotated

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ["T", "size", "per_sequence", "tokens"]  # integers that never select another compiled kernel


@triton.jit
def locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED: tl.constexpr):
    """Sequence n of a segment, its first token, its length, and whether it is the first, the last of its sequence.

    Spare segments of a packed batch (their number is a bound, known without reading cu_seqlens) have length 0 and are
    neither first nor last, so they write nothing; an empty sequence has one segment of length 0 that is both.
    """
    if PACKED:
        n = tl.load(owner + segment)
        index = segment - tl.load(first + n)
        begin = tl.load(cu_seqlens + n) + index * size
        end = tl.load(cu_seqlens + n + 1)
        is_last = segment + 1 == tl.load(first + n + 1)
    else:
        n = segment // per_sequence
        index = segment % per_sequence
        begin = n * T + index * size
        end = (n + 1) * T
        is_last = index + 1 == per_sequence
    length = tl.maximum(tl.minimum(end - begin, size), 0).to(tl.int32)
    return n, begin, length, index == 0, is_last


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(
    g, sums, owner, first, cu_seqlens, T, size, per_sequence, tokens,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, PROGRAMS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """sums [H, tokens]: the inclusive running sum of g inside each chunk of a segment, G, in units of log 2."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    h = pid % blocks * HEADS + tl.arange(0, HEADS)
    segment = (pid // (blocks * PROGRAMS)).to(tl.int64)
    _, begin, length, _, _ = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    for chunk in range(pid // blocks % PROGRAMS, tl.cdiv(length, C), PROGRAMS):
        time = chunk * C + tl.arange(0, C)
        valid = (time[:, None] < length) & (h[None, :] < H)
        tile = tl.load(g + (begin + time[:, None]) * H + h[None, :], mask=valid, other=0.0)
        G = tl.cumsum(tile * 1.4426950408889634, 0)
        tl.store(sums + h[None, :].to(tl.int64) * tokens + (begin + time[:, None]), G, mask=valid)


@triton.jit
def gates(sums, t, time, left, C: tl.constexpr):
    """G of a chunk's tokens, and G_C; behind the end G stays at G_C."""
    return tl.load(sums + t + tl.minimum(time, left - 1)), tl.load(sums + t + tl.minimum(C, left) - 1)


@triton.jit
def retain(
    a, b, c, sums, y, x, products, start, stop, marks, bounds, begin, length, tokens, h, j, is_stop,
    read_scale, write_scale, H: tl.constexpr, A: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Columns j * BLOCK ... of y over one segment, a, b [T, H, A] and c, y [T, H, N]; state [A, N] from `start`:

        y_i = sum_{j <= i} exp(G_i - G_j) r w (a_i . b_j) c_j  +  exp(G_i) r a_i S        (r read_scale, w write_scale)
        S'  = exp(G_C) S + sum_j exp(G_C - G_j) w b_j^T c_j

    REVERSE runs it from the last chunk to the first, every sum over i >= j instead and the decay still that of the
    tokens between:

        y_j = sum_{i >= j} exp(G_i - G_j) r w (a_j . b_i) c_i  +  exp(G_C - G_j) r a_j S
        S'  = exp(G_C) S + sum_i exp(G_i) w b_i^T c_i

    All exponents are at most 0. Element (r, n) of a state lies at r * ROW + n * COL. Each of these is optional:
    `stop` receives the state after the pass, if is_stop; `products` [N / BLOCK, T, H] the row sums of x * y before
    rounding; `marks` [mark, H, K, V] the state at the end of every GROUP tokens and of the segment (REVERSE), or they
    are read, and `bounds` [mark, H, N / BLOCK] receives their inner products with the state (the other direction).
    """
    dtype = c.dtype.element_ty
    time = tl.arange(0, C)
    rows = tl.arange(0, A)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    sums += h.to(tl.int64) * tokens
    matrix = rows[:, None] * ROW + cols[None, :] * COL
    if start is None:
        state = tl.zeros([A, BLOCK], dtype=tl.float32)
    else:
        state = tl.load(start + matrix)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        i = chunks - 1 - step if REVERSE else step
        left = length - i * C
        t = begin + i * C
        valid = time < left
        at_a = (t * H + h) * A
        at_c = (t * H + h) * N
        a_tile = tl.load(a + at_a + (time[:, None] * (H * A) + rows[None, :]), mask=valid[:, None], other=0.0)
        b_tile = tl.load(b + at_a + (rows[:, None] + time[None, :] * (H * A)), mask=valid[None, :], other=0.0)
        tile = time[:, None] * (H * N) + cols[None, :]
        c_tile = tl.load(c + at_c + tile, mask=valid[:, None], other=0.0)
        if x is not None:
            x_tile = tl.load(x + at_c + tile, mask=valid[:, None], other=0.0)
        G, total = gates(sums, t, time, left, C)
        if REVERSE:
            read, write = tl.exp2(total - G), tl.exp2(G)
            decay = tl.where(time[None, :] >= time[:, None], tl.exp2(G[None, :] - G[:, None]), 0.0)
        else:
            read, write = tl.exp2(G), tl.exp2(total - G)
            decay = tl.where(time[:, None] >= time[None, :], tl.exp2(G[:, None] - G[None, :]), 0.0)
        scores = tl.dot(a_tile, b_tile, input_precision="ieee") * (decay * (read_scale * write_scale))
        out = tl.dot(a_tile, state.to(dtype), input_precision="ieee") * (read * read_scale)[:, None]
        out = tl.dot(scores.to(dtype), c_tile, out, input_precision="ieee")
        tl.store(y + at_c + tile, out.to(dtype), mask=valid[:, None])
        if x is not None:
            row_sums = tl.sum(x_tile.to(tl.float32) * out, 1)
            tl.store(products + ((j * tokens + t) * H + h) + time * H, row_sums, mask=valid)
        weighted = (c_tile * (write * write_scale)[:, None]).to(dtype)
        if marks is None:
            state = tl.dot(b_tile, weighted, state * tl.exp2(total), input_precision="ieee")
        else:
            # a mark stands between chunk i and the next one: before the update when running backwards, after otherwise
            mark = (begin // GROUP + i * C // GROUP).to(tl.int64) * H + h
            at_mark = ((i + 1) * C % GROUP == 0) | (left <= C)
            if REVERSE:
                if at_mark:
                    tl.store(marks + mark * (A * N) + matrix, state.to(dtype))
                state = tl.dot(b_tile, weighted, state * tl.exp2(total), input_precision="ieee")
            else:
                state = tl.dot(b_tile, weighted, state * tl.exp2(total), input_precision="ieee")
                if at_mark:
                    gradient = tl.load(marks + mark * (A * N) + matrix).to(tl.float32)
                    tl.store(bounds + mark * (N // BLOCK) + j, tl.sum(tl.sum(state * gradient, 1), 0))
    if stop is not None:  # noqa: SIM102 (the outer condition is the compiler's, the inner one the kernel's)
        if is_stop:
            tl.store(stop + matrix, state)


@triton.jit(do_not_specialize=COUNTS)
def states_kernel(
    b, c, sums, states, decays, owner, first, cu_seqlens, T, size, per_sequence, tokens, write_scale,
    H: tl.constexpr, A: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What each segment of L tokens adds to the state, U = sum_j exp(G_L - G_j) w b_j^T c_j, and its decay exp(G_L).

    REVERSE is the gradient's: exp(G_j) instead. The segment whose sum nobody reads is skipped: the last of its sequence
    (REVERSE: the first).
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = N // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(tl.int64)
    _, begin, length, is_first, is_last = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    sums += h.to(tl.int64) * tokens
    skipped = is_first if REVERSE else is_last
    if not skipped:
        dtype = c.dtype.element_ty
        time = tl.arange(0, C)
        rows = tl.arange(0, A)
        cols = j * BLOCK + tl.arange(0, BLOCK)
        state = tl.zeros([A, BLOCK], dtype=tl.float32)
        decay = 0.0
        chunks = tl.cdiv(length, C)
        for step in range(chunks):
            i = chunks - 1 - step if REVERSE else step
            left = length - i * C
            t = begin + i * C
            valid = time < left
            at_b = (t * H + h) * A
            at_c = (t * H + h) * N
            b_tile = tl.load(b + at_b + (rows[:, None] + time[None, :] * (H * A)), mask=valid[None, :], other=0.0)
            c_tile = tl.load(c + at_c + (time[:, None] * (H * N) + cols[None, :]), mask=valid[:, None], other=0.0)
            G, total = gates(sums, t, time, left, C)
            weight = tl.exp2(G) if REVERSE else tl.exp2(total - G)
            weighted = (c_tile * (weight * write_scale)[:, None]).to(dtype)
            state = tl.dot(b_tile, weighted, state * tl.exp2(total), input_precision="ieee")
            decay += total
        tl.store(states + (segment * H + h) * (A * N) + rows[:, None] * N + cols[None, :], state)
        if j == 0:
            tl.store(decays + segment * H + h, tl.exp2(decay))


@triton.jit(do_not_specialize=COUNTS)
def scan_kernel(
    states, decays, initial, first, per_sequence,
    H: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Replace each segment's U by the state it starts from: S of the first is `initial`, S_{s+1} = decay_s S_s + U_s.

    REVERSE starts from the last segment and goes to the first.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = SIZE // BLOCK
    element = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    h = pid // blocks % H
    n = (pid // (blocks * H)).to(tl.int64)
    if PACKED:
        low, high = tl.load(first + n), tl.load(first + n + 1)
    else:
        low, high = n * per_sequence, (n + 1) * per_sequence
    if initial is None:
        state = tl.zeros([BLOCK], dtype=tl.float32)
    else:
        state = tl.load(initial + (n * H + h) * SIZE + element)
    for step in range(low, high):
        segment = high - 1 - (step - low) if REVERSE else step
        more = step + 1 < high
        at = (segment * H + h) * SIZE + element
        added = tl.load(states + at, mask=(element >= 0) & more, other=0.0)
        decay = tl.load(decays + segment * H + h, mask=more, other=0.0)
        tl.store(states + at, state)
        state = decay * state + added


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, sums, o, start, final, owner, first, cu_seqlens, T, size, per_sequence, tokens, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """o = retain(q, k, v) by blocks of V, and the state after each sequence; start [segments, H, K, V]."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = V // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(tl.int64)
    n, begin, length, _, is_last = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    if start is not None:
        start += (segment * H + h) * (K * V)
    retain(
        q, k, v, sums, o, None, None, start, final + (n * H + h) * (K * V), None, None, begin, length, tokens, h, j,
        is_last, 1.0, scale, H, K, V, BLOCK, C, 1, V, 1, False,
    )  # fmt: skip
