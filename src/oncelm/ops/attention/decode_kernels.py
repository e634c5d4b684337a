"""The two kernels of decode attention: split_kernel reads the cache, join_kernel puts its parts together.

The work is a line: sequence after sequence, in it one key/value head after the other, in that the sequence's tokens in
tiles of BLOCK. It is cut into equal shares of tiles, one a program, on the device, from `lengths`. A program walks over
its share; all query heads (and tokens) that share a head of the cache meet a tile of keys at once, as its *rows*. Where
its share leaves a head it writes what it has, a *part*: normalised outputs and log-sum-exps. join_kernel joins the
parts of each head.

Scores, softmax and sums are float32, exponentials of base 2. All matrices stand with keys or dimensions down and the
few rows across: scores [BLOCK, ROWS], outputs [D, ROWS]. So the large operand of a product, keys or values, is its
first, which the matrix units of Hopper take from shared memory in strips of 64, while the rows may be as few as 8.

Quantised keys and values become float16 as they stand, in registers; their scales multiply scores and weights, and what
they meet in a product is brought into float16's range first. They are read as pairs of dimensions, int16 each, because
the instruction that transposes values on their way into registers moves 16 bits: the even dimensions then are one
operand, the odd ones another.
"""

# mypy: allow-incomplete-defs
# a kernel's arguments are pointers and numbers whose types Triton infers; only its constants are annotated

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LARGEST_WEIGHT = tl.constexpr(32768.0)  # that a float16 holds, so that small ones keep their digits

# two pairs of 8-bit numbers -> the first or the second of each as float16
FLOAT8_ASM = (
    "{ .reg .b32 t; .reg .b16 even, odd; prmt.b32 t, $1, $1, 0x3120; mov.b32 {even, odd}, t;"
    " cvt.rn.f16x2.e4m3x2 $0, HALF; }"
)
# a byte b of 0..255 in the mantissa of 1024 is 1024 + b; 0xE480 is -1152, which takes the 128 off that xor has added
INT8_ASM = (
    "{ .reg .b32 t, c; xor.b32 t, $1, 0x80808080; prmt.b32 t, t, 0x64646464, HALF;"
    " mov.b32 c, 0xE480E480; add.rn.f16x2 $0, t, c; }"
)
EVEN_FLOAT8 = tl.constexpr(FLOAT8_ASM.replace("HALF", "even"))
ODD_FLOAT8 = tl.constexpr(FLOAT8_ASM.replace("HALF", "odd"))
EVEN_INT8 = tl.constexpr(INT8_ASM.replace("HALF", "0x4240"))
ODD_INT8 = tl.constexpr(INT8_ASM.replace("HALF", "0x4341"))

# integers that a kernel does not gain by knowing more about: without this, N = 1 would be a kernel of its own
PLAIN = (
    "N", "capacity", "table_sequence", "k_scale_block", "k_scale_token", "k_scale_head",
    "v_scale_block", "v_scale_token", "v_scale_head",
)  # fmt: skip


@triton.jit
def _share(
    lengths, N, capacity, H_KV: tl.constexpr, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Each sequence's tokens and where it ends on the line, both [SEQUENCES], and the tiles a program takes."""
    sequence = tl.arange(0, SEQUENCES)
    tokens = tl.load(lengths + sequence, mask=sequence < N, other=0)
    tokens = tl.minimum(tl.maximum(tokens, 0), capacity).to(tl.int32)
    ends = tl.cumsum(tl.cdiv(tokens, BLOCK), 0) * H_KV
    return tokens, ends, tl.cdiv(tl.max(ends, 0), PROGRAMS)


@triton.jit
def _sequence(n, tokens, ends, H_KV: tl.constexpr, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """Sequence n's tokens, its tiles a head, and where it begins on the line."""
    own = tl.arange(0, SEQUENCES) == n
    length = tl.sum(tl.where(own, tokens, 0), 0)
    tiles = tl.cdiv(length, BLOCK)
    return length, tiles, tl.sum(tl.where(own, ends, 0), 0) - tiles * H_KV


@triton.jit
def _halves(pairs, IS_INT: tl.constexpr, ASM: tl.constexpr):
    """The first and the second of each pair of 8-bit numbers in an int16, as float16."""
    if ASM:
        even_asm: tl.constexpr = EVEN_INT8 if IS_INT else EVEN_FLOAT8
        odd_asm: tl.constexpr = ODD_INT8 if IS_INT else ODD_FLOAT8
        even = tl.inline_asm_elementwise(even_asm, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
        odd = tl.inline_asm_elementwise(odd_asm, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
    else:
        dtype: tl.constexpr = tl.int8 if IS_INT else tl.float8e4nv
        even = (pairs & 0xFF).to(tl.uint8).to(dtype, bitcast=True).to(tl.float16)
        odd = ((pairs >> 8) & 0xFF).to(tl.uint8).to(dtype, bitcast=True).to(tl.float16)
    return even, odd


@triton.jit
def _tile(x, block, place, own, x_block, x_token, IN_ONE_BLOCK: tl.constexpr):
    """A pointer and offsets [BLOCK] to a tile's tokens, at `place` of `block`: both one number, or one a token."""
    if IN_ONE_BLOCK:
        x += block * x_block + place * x_token
        at = own * x_token  # the same 32-bit numbers for all tiles
    else:
        at = block * x_block + place * x_token
    return x, at


@triton.jit(do_not_specialize=PLAIN)
def split_kernel(
    q, k, v, k_scale, v_scale, lengths, block_tables, parts, lses, N, capacity, scale,
    q_sequence, q_token, q_head,
    k_block, k_token, k_head,
    v_block, v_token, v_head,
    k_scale_block, k_scale_token, k_scale_head,
    v_scale_block, v_scale_token, v_scale_head,
    table_sequence,
    T: tl.constexpr, H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, PROGRAMS: tl.constexpr,
    PAIRS: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Parts [programs + N H_kv, T GROUP, D] and their log-sum-exps [programs + N H_kv, T GROUP], base 2.

    PAGE is the block size of a paged cache, 0 without one: a block is then a sequence. The part of program p for head h
    of sequence n is number p + n H_KV + h: the next part on the line has a later program or a later head. `scale` is
    not negative. PAIRS: 8-bit keys and values are read as pairs, ASM: and converted by PTX.
    """
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    tokens, ends, share = _share(lengths, N, capacity, H_KV, BLOCK, SEQUENCES, PROGRAMS)
    here = program * share
    stop = tl.minimum(here + share, tl.max(ends, 0))
    IS_8_BIT: tl.constexpr = k_scale is not None
    IS_INT: tl.constexpr = k.dtype.element_ty == tl.int8
    IN_ONE_BLOCK: tl.constexpr = PAGE == 0 or PAGE >= BLOCK  # both are powers of two
    WIDTH: tl.constexpr = D // 2 if PAIRS else D  # numbers that are loaded a token
    if PAIRS:
        k, v = k.to(tl.pointer_type(tl.int16)), v.to(tl.pointer_type(tl.int16))
        k_block, k_token, k_head = k_block // 2, k_token // 2, k_head // 2
        v_block, v_token, v_head = v_block // 2, v_token // 2, v_head // 2
    row = tl.arange(0, ROWS)
    own = tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    while here < stop:
        n = tl.sum((ends <= here).to(tl.int32), 0)
        length, tiles, origin = _sequence(n, tokens, ends, H_KV, BLOCK, SEQUENCES)
        head = (here - origin) // tiles
        first = (here - origin) % tiles
        last = tl.minimum(tiles, first + stop - here)

        n_64, head_64 = n.to(tl.int64), head.to(tl.int64)
        q_at = n_64 * q_sequence + (row // GROUP) * q_token + (head * GROUP + row % GROUP) * q_head
        real = row < T * GROUP
        queries = tl.load(q + q_at[:, None] + tl.arange(0, D), mask=real[:, None], other=0.0)
        row_scale = tl.full([ROWS], scale, tl.float32)
        if IS_8_BIT and queries.dtype != tl.float32:
            queries = queries.to(tl.float32)
            largest = tl.max(tl.abs(queries), 1)
            largest = tl.where(largest == 0.0, 1.0, largest)
            queries = (queries / largest[:, None]).to(tl.float16)
            row_scale *= largest
        if PAIRS:
            queries, odd_queries = tl.split(tl.reshape(queries, [ROWS, WIDTH, 2]))
        row_scale = tl.maximum(row_scale, 1e-30)  # 0 times the minus infinity of a masked score is not a number
        sees = length - T + row // GROUP  # the last key that a row sees
        k_base, v_base = k + head_64 * k_head, v + head_64 * v_head
        if IS_8_BIT:
            k_scale_base, v_scale_base = k_scale + head_64 * k_scale_head, v_scale + head_64 * v_scale_head
        if PAGE > 0:
            table = block_tables + n_64 * table_sequence
            if IN_ONE_BLOCK:
                next_block = tl.load(table + first * BLOCK // PAGE)  # a tile ahead, so that no load waits for it

        top = tl.full([ROWS], float("-inf"), tl.float32)  # the largest score so far, before row_scale
        total = tl.zeros([BLOCK, ROWS], tl.float32)  # of the weights; added up over the keys at the end
        top_scale = 1e-37  # the largest of the values so far: o is in units of it
        o = tl.zeros([WIDTH, ROWS], tl.float32)
        if PAIRS:
            odd_o = tl.zeros([WIDTH, ROWS], tl.float32)
        for tile in range(first, last):
            start = tile * BLOCK
            key = start + own
            there = key < length
            if PAGE == 0:
                block, place = n_64, start.to(tl.int64)
            elif IN_ONE_BLOCK:
                block, place = next_block.to(tl.int64), (start % PAGE).to(tl.int64)
                next_block = tl.load(table + tl.minimum(tile + 1, last - 1) * BLOCK // PAGE)
            else:
                block = tl.load(table + key // PAGE, mask=there, other=0).to(tl.int64)
                place = (key % PAGE).to(tl.int64)
            x, at = _tile(k_base, block, place, own, k_block, k_token, IN_ONE_BLOCK)
            keys = tl.load(x + (at[:, None] + dim), mask=there[:, None], other=0.0)  # [BLOCK, WIDTH]
            x, at = _tile(v_base, block, place, own, v_block, v_token, IN_ONE_BLOCK)
            # [WIDTH, BLOCK]: transposed by where they are loaded from, as tl.trans would do it in registers
            values = tl.load(x + (at + dim[:, None]), mask=there, other=0.0)
            if IS_8_BIT:
                x, at = _tile(k_scale_base, block, place, own, k_scale_block, k_scale_token, IN_ONE_BLOCK)
                k_scales = tl.load(x + at, mask=there, other=0.0)
                x, at = _tile(v_scale_base, block, place, own, v_scale_block, v_scale_token, IN_ONE_BLOCK)
                v_scales = tl.load(x + at, mask=there, other=0.0)

            if PAIRS:
                even, odd = _halves(keys, IS_INT, ASM)
                scores = tl.dot(even, tl.trans(queries))
                scores = tl.dot(odd, tl.trans(odd_queries), scores)
            else:
                scores = tl.dot(keys.to(queries.dtype), tl.trans(queries), input_precision="ieee")
            if IS_8_BIT:
                scores *= k_scales[:, None]
            scores = tl.where(there[:, None] if T == 1 else key[:, None] <= sees, scores, float("-inf"))

            highest = tl.maximum(top, tl.max(scores, 0))
            finite = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen no key yet
            weights = tl.exp2(scores * row_scale - finite * row_scale)
            shrink = tl.exp2((top - finite) * row_scale)  # exactly 1 where the top stays
            total = total * shrink + weights
            top = highest
            if IS_8_BIT:
                highest_scale = tl.maximum(top_scale, tl.max(v_scales, 0))
                weights *= (v_scales / highest_scale * LARGEST_WEIGHT)[:, None]
                shrink *= top_scale / highest_scale
                top_scale = highest_scale
            weights = weights.to(queries.dtype)
            o *= shrink
            if PAIRS:
                even, odd = _halves(values, IS_INT, ASM)
                o = tl.dot(even, weights, o)
                odd_o = tl.dot(odd, weights, odd_o * shrink)
            else:
                o = tl.dot(values.to(queries.dtype), weights, o, input_precision="ieee")

        total = tl.sum(total, 0)
        norm = 1.0 / tl.where(total == 0.0, 1.0, total)
        if IS_8_BIT:
            norm *= top_scale / LARGEST_WEIGHT
        part = (program + n * H_KV + head).to(tl.int64) * (T * GROUP) + row
        part_at = parts + part * D + dim[:, None] * (D // WIDTH)
        tl.store(part_at, o * norm, mask=real)
        if PAIRS:
            tl.store(part_at + 1, odd_o * norm, mask=real)
        tl.store(lses + part, top * row_scale + tl.log2(total), mask=real)
        here += last - first


@triton.jit(do_not_specialize=PLAIN)
def join_kernel(
    parts, lses, lengths, o, N, capacity,
    T: tl.constexpr, H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, PROGRAMS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """o [N, T, H_KV GROUP, D]: the parts of each head, weighted by their sums. One program a query and head."""
    row = tl.program_id(0) % (T * GROUP)
    item = tl.program_id(0) // (T * GROUP)
    tokens, ends, share = _share(lengths, N, capacity, H_KV, BLOCK, SEQUENCES, PROGRAMS)
    n, head = item // H_KV, item % H_KV
    _, tiles, origin = _sequence(n, tokens, ends, H_KV, BLOCK, SEQUENCES)
    origin += head * tiles
    share = tl.maximum(share, 1)
    first, stop = origin // share, tl.where(tiles == 0, 0, (origin + tiles - 1) // share + 1)  # programs
    dim = tl.arange(0, D)
    if EARLY:
        gdc_wait()  # launched while split_kernel ran; here it has ended
    top = float("-inf")
    total = 0.0
    joined = tl.zeros([D], tl.float32)
    for start in range(first, stop, SPLITS):
        program = start + tl.arange(0, SPLITS)
        part = (program + item).to(tl.int64) * (T * GROUP) + row
        lse = tl.load(lses + part, mask=program < stop, other=float("-inf"))
        part_o = tl.load(parts + part[:, None] * D + dim, mask=(program < stop)[:, None], other=0.0)
        highest = tl.maximum(top, tl.max(lse, 0))
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(lse - finite)
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 0)
        joined = joined * shrink + tl.sum(weights[:, None] * part_o, 0)
        top = highest
    joined /= tl.where(total == 0.0, 1.0, total)
    at = (n.to(tl.int64) * T + row // GROUP) * (H_KV * GROUP) + head * GROUP + row % GROUP
    tl.store(o + at * D + dim, joined.to(o.dtype.element_ty))
