"""The kernels of decode_linear: a few rows of x against large weights, with what stands before and after them.

A product with few rows is bound by reading the weights, so every kernel reads each weight once, and each program makes
what stands before the product (a norm, a gate) again for itself: x is small and in the L2 cache. Up to four rows are
multiplied on the vector units and summed at the end; more go through the matrix units. The M rows are padded to MP, a
power of two. Sums are float32.
"""

# mypy: allow-incomplete-defs
# a kernel's arguments are pointers and numbers whose types Triton infers; only its constants are annotated

from __future__ import annotations

import triton
import triton.language as tl

PLAIN, ROPE, DECAY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how an output is finished


@triton.jit
def weight_tile(
    weight, rows, columns, COUNT: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """weight [COUNT, K] at rows and columns: [BLOCK_N, BLOCK_K], zeros outside."""
    places = weight + rows.to(tl.int64)[:, None] * K + columns[None, :]
    if COUNT % (2 * BLOCK_N) == 0 and K % BLOCK_K == 0:
        return tl.load(places, eviction_policy="evict_first")
    return tl.load(places, mask=(rows < COUNT)[:, None] & (columns < K)[None, :], other=0.0)


@triton.jit
def input_tile(x, columns, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr):
    """x [M, K] at columns: [MP, BLOCK_K] float32, zeros outside."""
    row = tl.arange(0, MP)[:, None]
    return tl.load(x + row * K + columns[None, :], mask=(row < M) & (columns < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def empty_sum(MP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where `multiply` sums: a few rows column by column, more rows in full."""
    if MP == 1:
        return tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    elif MP < 16:
        return tl.zeros([MP, BLOCK_N, BLOCK_K], tl.float32)
    else:
        return tl.zeros([BLOCK_N, MP], tl.float32)


@triton.jit
def multiply(total, tile, x, MP: tl.constexpr):
    """total plus the product of a weight tile [BLOCK_N, BLOCK_K] and x [MP, BLOCK_K]; `finish` ends the sum."""
    if MP == 1:
        return total + tile.to(tl.float32) * x
    elif MP < 16:
        return total + tile.to(tl.float32)[None, :, :] * x[:, None, :]
    else:
        return tl.dot(tile, tl.trans(x.to(tile.dtype)), total, input_precision="ieee")


@triton.jit
def finish(total, MP: tl.constexpr):
    """The sum [BLOCK_N, MP]."""
    if MP == 1:
        return tl.sum(total, 1)[:, None]
    elif MP < 16:
        return tl.trans(tl.sum(total, 2))
    else:
        return total


@triton.jit
def log_sigmoid(z):
    return tl.minimum(z, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def store_columns(y, rows, values, COUNT: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """values [BLOCK_N, MP] into the columns `rows` of y [M, COUNT]."""
    row = tl.arange(0, MP)[None, :]
    tl.store(y + row * COUNT + rows[:, None], values.to(y.dtype.element_ty), mask=(rows < COUNT)[:, None] & (row < M))


@triton.jit
def norm_linear_pair(
    x, norm_weight, eps, first_weight, second_weight, first_rows, second_rows,
    COUNT: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Two blocks of weight rows times rms_norm(x): [BLOCK_N, MP] float32 each. The norm is found on the way."""
    first = empty_sum(MP, BLOCK_N, BLOCK_K)
    second = empty_sum(MP, BLOCK_N, BLOCK_K)
    squares = tl.zeros([MP, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        first_tile = weight_tile(first_weight, first_rows, columns, COUNT, K, BLOCK_N, BLOCK_K)
        second_tile = weight_tile(second_weight, second_rows, columns, COUNT, K, BLOCK_N, BLOCK_K)
        inputs = input_tile(x, columns, M, MP, K)
        squares += inputs * inputs
        inputs *= tl.load(norm_weight + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
        first = multiply(first, first_tile, inputs, MP)
        second = multiply(second, second_tile, inputs, MP)
    scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[None, :]
    return finish(first, MP) * scale, finish(second, MP) * scale


@triton.jit
def norm_linears_kernel(
    x, norm_weight, eps, weights, outputs, rotation, decay_scale,
    COUNTS: tl.constexpr, KINDS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """outputs[j] [M, COUNTS[j]] = rms_norm(x) weights[j]^T, finished as KINDS[j] says; 2 BLOCK_N columns a program.

    ROPE rotates heads of 2 PAIRS columns by rotation [M, PAIRS, 2]; the blocks of rows are then the two of each pair.
    """
    program = tl.program_id(0)
    index = tl.arange(0, BLOCK_N)
    begin = 0
    for j in tl.static_range(len(COUNTS)):
        blocks = (COUNTS[j] + 2 * BLOCK_N - 1) // (2 * BLOCK_N)
        if program >= begin and program < begin + blocks:
            place = (program - begin) * BLOCK_N + index
            pair = place % PAIRS
            if KINDS[j] != ROPE:
                first_rows = 2 * (program - begin) * BLOCK_N + index
                second_rows = first_rows + BLOCK_N
            elif HALF:
                first_rows = place // PAIRS * (2 * PAIRS) + pair
                second_rows = first_rows + PAIRS
            else:
                first_rows = 2 * place
                second_rows = first_rows + 1
            first, second = norm_linear_pair(
                x, norm_weight, eps, weights[j], weights[j], first_rows, second_rows,
                COUNTS[j], M, MP, K, BLOCK_N, BLOCK_K, STAGES,
            )  # fmt: skip
            if KINDS[j] == ROPE:
                row = tl.arange(0, MP)[None, :]
                angle = rotation + 2 * (row * PAIRS + pair[:, None])
                cos = tl.load(angle, mask=row < M, other=0.0)
                sin = tl.load(angle + 1, mask=row < M, other=0.0)
                first, second = first * cos - second * sin, first * sin + second * cos
            if KINDS[j] == DECAY:
                first = log_sigmoid(first) * decay_scale
                second = log_sigmoid(second) * decay_scale
            store_columns(outputs[j], first_rows, first, COUNTS[j], M, MP)
            store_columns(outputs[j], second_rows, second, COUNTS[j], M, MP)
        begin += blocks


@triton.jit
def norm_swiglu_kernel(
    x, norm_weight, eps, weight, gate_weight, y,
    COUNT: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [M, COUNT] = silu(h weight^T) * (h gate_weight^T), h = rms_norm(x); BLOCK_N columns a program."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, second = norm_linear_pair(
        x, norm_weight, eps, weight, gate_weight, rows, rows, COUNT, M, MP, K, BLOCK_N, BLOCK_K, STAGES
    )
    store_columns(y, rows, first * tl.sigmoid(first) * second, COUNT, M, MP)


@triton.jit
def linear_add_kernel(
    x, gate, eps, weight, residual, y,
    COUNT: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [M, COUNT] = residual + z weight^T; z is x, or with a gate silu(gate) * rms_norm(x) of each head of HEAD."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = empty_sum(MP, BLOCK_N, BLOCK_K)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        tile = weight_tile(weight, rows, columns, COUNT, K, BLOCK_N, BLOCK_K)
        inputs = input_tile(x, columns, M, MP, K)
        if gate is not None:
            heads = inputs.reshape(MP, BLOCK_K // HEAD, HEAD)
            scale = tl.rsqrt(tl.sum(heads * heads, 2) / HEAD + eps)
            inputs = (heads * scale[:, :, None]).reshape(MP, BLOCK_K)
            gates = input_tile(gate, columns, M, MP, K)
            inputs *= gates * tl.sigmoid(gates)
        total = multiply(total, tile, inputs, MP)
    row = tl.arange(0, MP)[None, :]
    before = tl.load(residual + row * COUNT + rows[:, None], mask=(rows < COUNT)[:, None] & (row < M), other=0.0)
    store_columns(y, rows, finish(total, MP) + before.to(tl.float32), COUNT, M, MP)
