"""Gated retention in Triton: the pass over a segment that every kernel shares, and the kernels of the forward pass.

A sequence is cut into *segments* that run in parallel; inside one, a program walks over chunks of C tokens and keeps a
block of columns of the state in registers. `sums_kernel` prepares the decays. Where a sequence has several segments,
`states_kernel` sums what each adds to the state, and the programs of `forward_kernel` start from these sums; they read
q, k and v and write o. Token offsets are 64-bit and every grid is one-dimensional, so
neither T nor T x H x D is bounded. A product has its operands in the inputs' dtype and its sum in float32.
"""

# mypy: allow-incomplete-defs
# a kernel's arguments are pointers and numbers whose types Triton infers; only its constants are annotated

from __future__ import annotations

import triton
import triton.language as tl

UNDERFLOW = tl.constexpr(-150.0)  # 2^-150 is 0 in float32
COUNTS = ["T", "size", "per_sequence", "tokens"]  # integers that never select another compiled kernel


@triton.jit
def locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED: tl.constexpr):
    """Sequence n of a segment, its first token, its length, and the sequence's segments: low until before high.

    Spare segments of a packed batch (their number is a bound, known without reading cu_seqlens) have length 0 and lie
    behind high, so they write nothing; an empty sequence has one segment of length 0.
    """
    if PACKED:
        n = tl.load(owner + segment)
        low, high = tl.load(first + n), tl.load(first + n + 1)
        index = segment - low
        begin = tl.load(cu_seqlens + n) + index * size
        end = tl.load(cu_seqlens + n + 1)
    else:
        n = segment // per_sequence
        index = segment % per_sequence
        low, high = segment - index, segment - index + per_sequence
        begin = n * T + index * size
        end = (n + 1) * T
    length = tl.maximum(tl.minimum(end - begin, size), 0).to(tl.int32)
    return n, begin, length, low, high


@triton.jit
def add_start(
    state, states, decays, initial, segment, low, high, h, offsets,
    H: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """state + what a segment starts from (REVERSE: the gradient it ends with), elements `offsets` of it.

    That is the sum U of the segment before, plus that of the one before it times the first's decay, and so on until
    nothing is left in float32 or `initial` is reached. Without `states` the sequence is one segment.
    """
    decay = 1.0
    if states is not None:
        other = segment
        while ((other < high - 1) if REVERSE else (other > low)) & (decay > 0.0):
            other += 1 if REVERSE else -1
            at = other * H + h
            state += decay * tl.load(states + at * SIZE + offsets)
            decay *= tl.load(decays + at)
    if initial is not None:
        state += decay * tl.load(initial + offsets)
    return state


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
    a, b, c, sums, y, x, products, states, decays, initial, stop, marks, bounds, begin, length, tokens, segment, low,
    high, h, j, is_stop, read_scale, write_scale, H: tl.constexpr, A: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Columns j * BLOCK ... of y over one segment, a, b [T, H, A] and c, y [T, H, N]; state [A, N] from
    `add_start`:

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
    state = tl.zeros([A, BLOCK], dtype=tl.float32)
    state = add_start(state, states, decays, initial, segment, low, high, h, matrix, H, A * N, REVERSE)
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
    (REVERSE: the first). Chunks are read from the end that they decay towards, and those whose factor is 0 in float32
    not at all: how far back depends on g.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = N // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(tl.int64)
    _, begin, length, low, high = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    sums += h.to(tl.int64) * tokens
    unread = low if REVERSE else high - 1
    if segment != unread:
        chunks = tl.cdiv(length, C)
        decay = 0.0
        needed = 0
        while (needed < chunks) & (decay > UNDERFLOW):
            i = tl.arange(0, 64) + needed
            inside = i < chunks
            if not REVERSE:
                i = chunks - 1 - i
            totals = tl.load(sums + begin + tl.minimum((i + 1) * C, length) - 1, mask=inside, other=0.0)
            nearer = decay + tl.cumsum(totals, 0) - totals
            needed += tl.sum((inside & (nearer > UNDERFLOW)).to(tl.int32), 0)
            decay += tl.sum(totals, 0)

        dtype = c.dtype.element_ty
        time = tl.arange(0, C)
        rows = tl.arange(0, A)
        cols = j * BLOCK + tl.arange(0, BLOCK)
        state = tl.zeros([A, BLOCK], dtype=tl.float32)
        nearer_total = 0.0
        for step in range(needed):
            i = step if REVERSE else chunks - 1 - step
            left = length - i * C
            t = begin + i * C
            valid = time < left
            at_b = (t * H + h) * A
            at_c = (t * H + h) * N
            b_tile = tl.load(b + at_b + (rows[:, None] + time[None, :] * (H * A)), mask=valid[None, :], other=0.0)
            c_tile = tl.load(c + at_c + (time[:, None] * (H * N) + cols[None, :]), mask=valid[:, None], other=0.0)
            G, total = gates(sums, t, time, left, C)
            weight = tl.exp2(nearer_total + (G if REVERSE else total - G))
            weighted = (c_tile * (weight * write_scale)[:, None]).to(dtype)
            state = tl.dot(b_tile, weighted, state, input_precision="ieee")
            nearer_total += total
        tl.store(states + (segment * H + h) * (A * N) + rows[:, None] * N + cols[None, :], state)
        if j == 0:
            tl.store(decays + segment * H + h, tl.exp2(decay))


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, sums, o, states, decays, initial, final, owner, first, cu_seqlens, T, size, per_sequence, tokens, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """o = retain(q, k, v) by blocks of V, and the state after each sequence; states as states_kernel left them."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = V // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(tl.int64)
    n, begin, length, low, high = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    if initial is not None:
        initial += (n * H + h) * (K * V)
    retain(
        q, k, v, sums, o, None, None, states, decays, initial, final + (n * H + h) * (K * V), None, None, begin, length,
        tokens, segment, low, high, h, j, segment + 1 == high, 1.0, scale, H, K, V, BLOCK, C, 1, V, 1, False,
    )  # fmt: skip
