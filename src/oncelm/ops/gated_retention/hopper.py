"""Gated retention on Hopper: the pass of triton_forward.retain in Gluon, which leaves the order of events to us.

Triton's own pipeline asks for a chunk only behind the products of the one before, and waits for each product where it
starts. Here a chunk is copied while the one before is computed, and products run while the gates are:

    S of chunk i times its a       beside  the copies of chunk i + 1, the decays of chunk i
    y of chunk i, S of chunk i+1,
    scores b a^T of chunk i + 1    beside  y of chunk i on its way to memory

Everything is transposed: the state S^T [BLOCK, A] never leaves the registers, where a product's left operand and its
sum may lie. A is cut into two panels, so that only half of S is rounded into operands at a time.
"""

# ruff: noqa: RUF005, SIM102 (no starred tuples in a kernel; an outer condition is the compiler's, an inner the kernel's)
# mypy: ignore-errors
# a kernel's values and arguments have types that Gluon infers; only its constants are annotated

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from oncelm.ops.gated_retention.triton_forward import COUNTS, add_start, locate

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6
CHUNK = 64  # tokens
C = gl.constexpr(CHUNK)


@gluon.jit
def copy_chunk(
    a, b, c, sums, a_panels, b_panels, c_tiles, G_rows, slot, t, left, h, j,
    H: gl.constexpr, A: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Start copying the chunk at token t into a slot: a and b by panels, c's block, G; `left` tokens, zeros behind."""
    W: gl.constexpr = gl.num_warps()
    PANEL: gl.constexpr = max(64, A // 2)
    panels: gl.constexpr = A // PANEL
    of_panel: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PANEL, PANEL // 8], [W, 1], [1, 0])
    of_block: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK, BLOCK // 8], [W, 1], [1, 0])
    row = gl.arange(0, C, gl.SliceLayout(1, of_panel))
    offset = row[:, None] * (H * A) + gl.arange(0, PANEL, gl.SliceLayout(0, of_panel))[None, :]
    valid = (row < left)[:, None]
    at = (t * H + h) * A
    for s in gl.static_range(panels):
        async_copy.async_copy_global_to_shared(a_panels[s].index(slot), a + (at + s * PANEL) + offset, valid)
    for s in gl.static_range(panels):
        async_copy.async_copy_global_to_shared(b_panels[s].index(slot), b + (at + s * PANEL) + offset, valid)
    row = gl.arange(0, C, gl.SliceLayout(1, of_block))
    offset = row[:, None] * (H * N) + gl.arange(0, BLOCK, gl.SliceLayout(0, of_block))[None, :]
    at = (t * H + h) * N + j * BLOCK
    async_copy.async_copy_global_to_shared(c_tiles.index(slot), c + at + offset, (row < left)[:, None])
    time = gl.arange(0, C, gl.BlockedLayout([1], [32], [W], [0]))
    async_copy.async_copy_global_to_shared(G_rows.index(slot), sums + t + gl.minimum(time, left - 1))
    async_copy.commit_group()


@gluon.jit
def score(a_panels, b_panels, slot, panels: gl.constexpr, layout: gl.constexpr):
    """b a^T [C, C] of the chunk in a slot, started, not awaited."""
    scores = gl.zeros([C, C], gl.float32, layout)
    for s in gl.static_range(panels):
        a_tile = a_panels[s].index(slot).permute((1, 0))
        scores = warpgroup_mma(b_panels[s].index(slot), a_tile, scores, use_acc=s > 0, is_async=True)
    return scores


@gluon.jit
def retain(
    a, b, c, sums, y, x, products, states, decays, initial, stop, marks, bounds, begin, length, tokens, segment, low,
    high, h, j, is_stop, read_scale, write_scale, H: gl.constexpr, A: gl.constexpr, N: gl.constexpr,
    BLOCK: gl.constexpr, GROUP: gl.constexpr, ROW: gl.constexpr, COL: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """triton_forward.retain for 16-bit dtypes, chunks of 64 tokens, A of at least 64 and BLOCK / 16 warps."""
    W: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = c.dtype.element_ty
    PANEL: gl.constexpr = max(64, A // 2)
    panels: gl.constexpr = A // PANEL
    # sums [BLOCK, *], 16 rows a warp; the same as a left operand in registers; scores [C, C]; y's rows in memory
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, acc, 2)
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, W // 4], [16, 256 // W, 16])
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK, BLOCK // 8], [W, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    a_panels = ()  # one allocation each: the compiler puts a barrier between copies into the same one
    b_panels = ()
    for _ in gl.static_range(panels):
        a_panels = a_panels + (gl.allocate_shared_memory(dtype, [2, C, PANEL], shared),)
        b_panels = b_panels + (gl.allocate_shared_memory(dtype, [2, C, PANEL], shared),)
    c_tiles = gl.allocate_shared_memory(dtype, [2, C, BLOCK], shared)
    G_rows = gl.allocate_shared_memory(gl.float32, [2, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    weights = gl.allocate_shared_memory(dtype, [C, C], shared)
    if x is None:
        y_rows = gl.allocate_shared_memory(dtype, [C, BLOCK], shared)
    else:
        y_rows = gl.allocate_shared_memory(gl.float32, [C, BLOCK], gl.NVMMASharedLayout(128, 32, 2))

    col = j * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, acc))
    panel = gl.arange(0, PANEL, gl.SliceLayout(0, acc))
    matrix = col[:, None] * COL + panel[None, :] * ROW
    state = ()
    for s in gl.static_range(panels):
        zeros = gl.zeros([BLOCK, PANEL], gl.float32, acc)
        offsets = s * PANEL * ROW + matrix
        state = state + (add_start(zeros, states, decays, initial, segment, low, high, h, offsets, H, A * N, REVERSE),)

    u = gl.arange(0, C, gl.SliceLayout(1, square))
    reader = gl.arange(0, C, gl.SliceLayout(0, square))
    seen = (u[:, None] >= reader[None, :]) if REVERSE else (u[:, None] <= reader[None, :])
    time = gl.arange(0, C, gl.SliceLayout(1, rows))
    tile = time[:, None] * (H * N) + j * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, rows))[None, :]

    sums += h.to(gl.int64) * tokens
    chunks = gl.cdiv(length, C)
    first = chunks - 1 if REVERSE else 0
    left = length - first * C
    t = begin + first * C
    total = 0.0
    if chunks > 0:
        copy_chunk(a, b, c, sums, a_panels, b_panels, c_tiles, G_rows, 0, t, left, h, j, H, A, N, BLOCK)
        total = gl.load(sums + t + gl.minimum(C, left) - 1)
    async_copy.wait_group(0)
    fence_async_shared()
    scores = warpgroup_mma_wait(0, [score(a_panels, b_panels, 0, panels, square)])
    for step in range(chunks):
        i = chunks - 1 - step if REVERSE else step
        slot = step % 2
        left = length - i * C
        t = begin + i * C
        next_total = total
        barrier()  # everyone is done with the chunk before
        if step + 1 < chunks:
            ahead = i - 1 if REVERSE else i + 1
            more = length - ahead * C
            at = begin + ahead * C
            copy_chunk(a, b, c, sums, a_panels, b_panels, c_tiles, G_rows, 1 - slot, at, more, h, j, H, A, N, BLOCK)
            next_total = gl.load(sums + at + gl.minimum(C, more) - 1)

        # a mark stands between chunk i and the next one: before the update when running backwards, after otherwise
        mark = (begin // GROUP + i * C // GROUP).to(gl.int64) * H + h
        at_mark = ((i + 1) * C % GROUP == 0) | (left <= C)

        out = gl.zeros([BLOCK, C], gl.float32, acc)
        for s in gl.static_range(panels):
            rounded = state[s].to(dtype)
            if marks is not None and REVERSE:
                if at_mark:
                    gl.store(marks + mark * (A * N) + s * PANEL * ROW + matrix, rounded)
            a_tile = a_panels[s].index(slot).permute((1, 0))
            out = warpgroup_mma(gl.convert_layout(rounded, operand), a_tile, out, use_acc=s > 0, is_async=True)
            if s == 0:
                G = G_rows.index(slot)
                G_from = G.load(gl.SliceLayout(1, square))
                G_to = G.load(gl.SliceLayout(0, square))
                between = (G_from[:, None] - G_to[None, :]) if REVERSE else (G_to[None, :] - G_from[:, None])
                decay = gl.where(seen, gl.exp2(between), 0.0) * (read_scale * write_scale)
                weights.store((scores * decay).to(dtype))
            if s + 1 < panels:
                out = warpgroup_mma_wait(0, [out])
        G_out = G.load(gl.SliceLayout(0, acc))
        G_weight = G.load(gl.SliceLayout(0, operand))
        if REVERSE:
            read, write = gl.exp2(total - G_out), gl.exp2(G_weight)
        else:
            read, write = gl.exp2(G_out), gl.exp2(total - G_weight)
        c_tile = c_tiles.index(slot).permute((1, 0))
        weighted = c_tile.load(operand)
        weighted = (weighted.to(gl.float32) * (write * write_scale)[None, :]).to(dtype)

        keep = gl.exp2(total)
        kept = ()
        for s in gl.static_range(panels):
            kept = kept + (state[s] * keep,)
        fence_async_shared()
        barrier()
        out = warpgroup_mma_wait(0, [out]) * (read * read_scale)[None, :]
        if x is not None:
            x_tile = gl.load(x + (t * H + h) * N + tile, (time < left)[:, None], other=0.0)

        out = warpgroup_mma(c_tile, weights, out, is_async=True)
        updated = ()
        for s in gl.static_range(panels):
            updated = updated + (warpgroup_mma(weighted, b_panels[s].index(slot), kept[s], is_async=True),)
        async_copy.wait_group(0)
        fence_async_shared()
        scores = score(a_panels, b_panels, 1 - slot, panels, square)  # of the next chunk; behind the last, unused

        out = warpgroup_mma_wait(2 * panels, [out])
        y_rows.permute((1, 0)).store(out.to(y_rows.dtype))
        y_tile = y_rows.load(rows)
        if x is not None:
            row_sums = gl.sum(x_tile.to(gl.float32) * y_tile, 1)
            gl.store(products + ((j * tokens + t) * H + h) + time * H, row_sums, time < left)
        gl.store(y + (t * H + h) * N + tile, y_tile.to(dtype), (time < left)[:, None])
        done = warpgroup_mma_wait(0, updated + (scores,))
        state = done[:panels]
        scores = done[panels]
        if marks is not None and not REVERSE:
            if at_mark:
                product = 0.0
                for s in gl.static_range(panels):
                    gradient = gl.load(marks + mark * (A * N) + s * PANEL * ROW + matrix).to(gl.float32)
                    product += gl.sum(gl.sum(state[s] * gradient, 1), 0)
                gl.store(bounds + mark * (N // BLOCK) + j, product)
        total = next_total
    if stop is not None:
        if is_stop:
            for s in gl.static_range(panels):
                gl.store(stop + s * PANEL * ROW + matrix, state[s])


@gluon.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, sums, o, states, decays, initial, final, owner, first, cu_seqlens, T, size, per_sequence, tokens, scale,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """o = retain(q, k, v) by blocks of V, and the state after each sequence; states as states_kernel left them."""
    pid = gl.program_id(0)
    blocks: gl.constexpr = V // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(gl.int64)
    n, begin, length, low, high = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    if initial is not None:
        initial += (n * H + h) * (K * V)
    retain(
        q, k, v, sums, o, None, None, states, decays, initial, final + (n * H + h) * (K * V), None, None, begin, length,
        tokens, segment, low, high, h, j, segment + 1 == high, 1.0, scale, H, K, V, BLOCK, 1, V, 1, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=COUNTS)
def key_value_kernel(
    q, k, v, sums, do, dk, dv, states, decays, d_final, d_initial, marks, products, owner, first, cu_seqlens, T, size,
    per_sequence, tokens, scale, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr,
    GROUP: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """dk by blocks of K and dv by blocks of V; neighbouring programs read the same q, k, v, do.

    states and decays are the gradient's.
    """
    pid = gl.program_id(0)
    blocks: gl.constexpr = (K + V) // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(gl.int64)
    n, begin, length, low, high = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    if d_final is not None:
        d_final += (n * H + h) * (K * V)
    if j < K // BLOCK:
        retain(
            v, do, q, sums, dk, k, products, states, decays, d_final, None, marks + segment * (H * K * V), None, begin,
            length, tokens, segment, low, high, h, j, False, scale, 1.0, H, V, K, BLOCK, GROUP, 1, V, True,
        )  # fmt: skip
    else:
        retain(
            k, q, do, sums, dv, None, None, states, decays, d_final, d_initial + (n * H + h) * (K * V), None, None,
            begin, length, tokens, segment, low, high, h, j - K // BLOCK, segment == low, scale, 1.0, H, K, V, BLOCK,
            GROUP, V, 1, True,
        )  # fmt: skip


@gluon.jit(do_not_specialize=COUNTS)
def query_kernel(
    q, k, v, sums, do, dq, states, decays, initial, marks, products, bounds, owner, first, cu_seqlens, T, size,
    per_sequence, tokens, scale, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK: gl.constexpr,
    GROUP: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """dq by blocks of K, and the inner products <S, dS> at the marks."""
    pid = gl.program_id(0)
    blocks: gl.constexpr = K // BLOCK
    j = pid % blocks
    h = pid // blocks % H
    segment = (pid // (blocks * H)).to(gl.int64)
    n, begin, length, low, high = locate(segment, owner, first, cu_seqlens, T, size, per_sequence, PACKED)
    if initial is not None:
        initial += (n * H + h) * (K * V)
    retain(
        do, v, k, sums, dq, q, products, states, decays, initial, None, marks + segment * (H * K * V),
        bounds + segment * (H * blocks), begin, length, tokens, segment, low, high, h, j, False, 1.0, scale, H, V, K,
        BLOCK, GROUP, 1, V, False,
    )  # fmt: skip
