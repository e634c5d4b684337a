"""Decode attention on a GPU: few queries a sequence, a long cache; every key and value is read once.

The work is a line: sequence after sequence, in it one key/value head after the other, in that the sequence's tokens in
units of UNIT. It is cut into equal shares, one a program, on the device, from `lengths`: whatever lengths a batch mixes
and however much larger the cache is than what it holds, all multiprocessors read the same number of bytes, and the
launch depends on shapes alone, so that a CUDA graph can hold it. A program walks over its share; all query heads (and
tokens) that share a head of the cache are rows of one tile. Where its share leaves a head it writes what it has, a
*part*: normalised outputs and log-sum-exps. A second kernel joins the parts of each head.

Scores, softmax and sums are float32, exponentials of base 2. Quantised keys and values become 16-bit numbers as they
stand; their scales multiply scores and weights. A float8 becomes a float16, in one instruction a pair (a bfloat16 takes
four), and what it meets in a product is brought into float16's range first.
"""

# mypy: allow-incomplete-defs
# a kernel's arguments are pointers and numbers whose types Triton infers; only its constants are annotated

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from oncelm.ops import gpu
from oncelm.ops.attention import decode

Tensor = torch.Tensor

UNIT = tl.constexpr(16)  # tokens; shares begin and end at multiples of it, so it divides every block size
LOG2_E = 1.4426950408889634
INTERPRETED_PROGRAMS = 7  # under TRITON_INTERPRET=1
LARGEST_WEIGHT = tl.constexpr(32768.0)  # that a float16 holds, so that small ones keep their digits

# integers that a kernel does not gain by knowing more about: without this, N = 1 would be a kernel of its own
PLAIN = (
    "N", "capacity", "table_sequence", "k_scale_block", "k_scale_token", "k_scale_head",
    "v_scale_block", "v_scale_token", "v_scale_head",
)  # fmt: skip


@triton.jit
def _share(lengths, N, capacity, H_KV: tl.constexpr, SEQUENCES: tl.constexpr, PROGRAMS: tl.constexpr):
    """Each sequence's tokens and where it ends on the line, both [SEQUENCES], and the units a program takes."""
    sequence = tl.arange(0, SEQUENCES)
    tokens = tl.load(lengths + sequence, mask=sequence < N, other=0)
    tokens = tl.minimum(tl.maximum(tokens, 0), capacity).to(tl.int32)
    ends = tl.cumsum(tl.cdiv(tokens, UNIT), 0) * H_KV
    return tokens, ends, tl.cdiv(tl.max(ends, 0), PROGRAMS)


@triton.jit
def _sequence(n, tokens, ends, H_KV: tl.constexpr, SEQUENCES: tl.constexpr):
    """Sequence n's tokens, its units a head, and where it begins on the line."""
    own = tl.arange(0, SEQUENCES) == n
    length = tl.sum(tl.where(own, tokens, 0), 0)
    units = tl.cdiv(length, UNIT)
    return length, units, tl.sum(tl.where(own, ends, 0), 0) - units * H_KV


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
    EARLY: tl.constexpr,
):  # fmt: skip
    """Parts [programs + N H_kv, T GROUP, D] and their log-sum-exps [programs + N H_kv, T GROUP], base 2.

    PAGE is the block size of a paged cache, 0 without one: a block is then a sequence. The part of program p for head h
    of sequence n is number p + n H_KV + h: the next part on the line has a later program or a later head.
    """
    if EARLY:
        gdc_launch_dependents()
    program = tl.program_id(0)
    tokens, ends, share = _share(lengths, N, capacity, H_KV, SEQUENCES, PROGRAMS)
    here = program * share
    stop = tl.minimum(here + share, tl.max(ends, 0))
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    while here < stop:
        n = tl.sum((ends <= here).to(tl.int32), 0)
        length, units, origin = _sequence(n, tokens, ends, H_KV, SEQUENCES)
        head = (here - origin) // units
        first = (here - origin) % units
        last = tl.minimum(units, first + stop - here)

        n_64, head_64 = n.to(tl.int64), head.to(tl.int64)
        q_at = n_64 * q_sequence + (row // GROUP) * q_token + (head * GROUP + row % GROUP) * q_head
        real = row < T * GROUP
        queries = tl.load(q + q_at[:, None] + dim, mask=real[:, None], other=0.0)
        row_scale = tl.full([ROWS], scale, tl.float32)
        if k.dtype.element_ty == tl.float8e4nv and queries.dtype != tl.float32:
            largest = tl.max(tl.abs(queries.to(tl.float32)), 1)
            largest = tl.where(largest == 0.0, 1.0, largest)
            queries = (queries.to(tl.float32) / largest[:, None]).to(tl.float16)
            row_scale *= largest
        sees = length - T + row // GROUP  # the last key that a row sees
        k_base, v_base = k + head_64 * k_head, v + head_64 * v_head
        if k_scale is not None:
            k_scale_base, v_scale_base = k_scale + head_64 * k_scale_head, v_scale + head_64 * v_scale_head
        if PAGE == 0:
            k_base, v_base = k_base + n_64 * k_block, v_base + n_64 * v_block
            if k_scale is not None:
                k_scale_base, v_scale_base = k_scale_base + n_64 * k_scale_block, v_scale_base + n_64 * v_scale_block

        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        top_scale = 1e-37  # the largest of the values so far: o is in units of it
        o = tl.zeros([ROWS, D], tl.float32)
        end = tl.minimum(last * UNIT, length)
        for start in range(first * UNIT, end, BLOCK):
            key = start + tl.arange(0, BLOCK)
            there = key < end
            if PAGE == 0:
                block = tl.zeros([BLOCK], tl.int64)
                place = key.to(tl.int64)
            else:
                block = tl.load(block_tables + n_64 * table_sequence + key // PAGE, mask=there, other=0).to(tl.int64)
                place = (key % PAGE).to(tl.int64)
            at = block * k_block + place * k_token
            keys = tl.load(k_base + at[:, None] + dim, mask=there[:, None], other=0.0)
            scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee")
            scores *= row_scale[:, None]
            if k_scale is not None:
                at = block * k_scale_block + place * k_scale_token
                scores *= tl.load(k_scale_base + at, mask=there, other=0.0)
            scores = tl.where(there & (key <= sees[:, None]), scores, float("-inf"))

            highest = tl.maximum(top, tl.max(scores, 1))
            finite = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen no key yet
            weights = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(top - finite)
            total = total * shrink + tl.sum(weights, 1)
            top = highest
            at = block * v_block + place * v_token
            values = tl.load(v_base + at[:, None] + dim, mask=there[:, None], other=0.0)
            if v_scale is not None:
                at = block * v_scale_block + place * v_scale_token
                scales = tl.load(v_scale_base + at, mask=there, other=0.0)
                highest_scale = tl.maximum(top_scale, tl.max(scales, 0))
                weights *= scales / highest_scale * LARGEST_WEIGHT
                shrink *= top_scale / highest_scale
                top_scale = highest_scale
            o *= shrink[:, None]
            o = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), o, input_precision="ieee")

        if v_scale is not None:
            o *= top_scale / LARGEST_WEIGHT
        o /= tl.where(total == 0.0, 1.0, total)[:, None]
        part = (program + n * H_KV + head).to(tl.int64) * (T * GROUP) + row
        tl.store(parts + part[:, None] * D + dim, o, mask=real[:, None])
        tl.store(lses + part, top + tl.log2(total), mask=real)
        here += last - first


@triton.jit(do_not_specialize=PLAIN)
def join_kernel(
    parts, lses, lengths, o, N, capacity,
    T: tl.constexpr, H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, SEQUENCES: tl.constexpr, PROGRAMS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """o [N, T, H_KV GROUP, D]: the parts of each head, weighted by their sums. One program a query and head."""
    row = tl.program_id(0) % (T * GROUP)
    item = tl.program_id(0) // (T * GROUP)
    tokens, ends, share = _share(lengths, N, capacity, H_KV, SEQUENCES, PROGRAMS)
    n, head = item // H_KV, item % H_KV
    _, units, origin = _sequence(n, tokens, ends, H_KV, SEQUENCES)
    origin += head * units
    share = tl.maximum(share, 1)
    first, stop = origin // share, tl.where(units == 0, 0, (origin + units - 1) // share + 1)  # programs
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


@dataclass(frozen=True)
class Config:
    """How split_kernel is compiled and launched: keys a tile, warps, pipeline stages, programs a multiprocessor."""

    block: int
    num_warps: int
    num_stages: int
    programs: int


# (dtype of keys, paged) -> largest head dimension -> Config for 16-bit queries, from sweeps of
# benchmarks/gpu_decode_attention.py (16 bits: H100; 8 bits: H200, dimensions of 64 and 256 not swept)
SIXTEEN_BITS = {64: Config(64, 4, 3, 2), 128: Config(64, 4, 3, 2), 256: Config(32, 4, 3, 2)}
INT8 = {64: Config(128, 4, 4, 3), 128: Config(128, 4, 3, 3), 256: Config(32, 4, 4, 3)}
FLOAT8 = INT8 | {128: Config(128, 4, 3, 2)}
CONFIGS = {  # paged or not, tiles and programs are the same, so that the bits are too
    (torch.int8, False): INT8,
    (torch.int8, True): INT8,
    (torch.float8_e4m3fn, False): FLOAT8,
    (torch.float8_e4m3fn, True): FLOAT8 | {128: Config(128, 4, 2, 2)},
}
FULL_PRECISION = Config(16, 8, 2, 2)  # float32 runs on the vector units, operands in registers: small tiles


def config(q: Tensor, k: Tensor, rows: int, is_paged: bool) -> Config:
    """The form for these inputs and `rows` queries that share a head."""
    if q.dtype == torch.float32:
        return FULL_PRECISION
    found = CONFIGS.get((k.dtype, is_paged), SIXTEEN_BITS)[max(64, q.shape[-1])]
    return found if rows <= 64 else Config(32, 8, 2, 1)


def _launches_early(index: int | None) -> bool:
    """Whether join_kernel may be launched before split_kernel has ended (programmatic dependent launch, Hopper on)."""
    return torch.version.hip is None and gpu.capability(index) >= (9, 0)


def _decode(q, k, v, lengths, block_tables, k_scale, v_scale, scale, programs):
    N, T, H, D = q.shape
    H_kv, page = k.shape[2], 0 if block_tables is None else k.shape[1]
    capacity = page * block_tables.shape[1] if page else k.shape[1]
    group = H // H_kv
    rows = T * group
    form = config(q, k, rows, bool(page))
    if not programs:
        programs = gpu.multiprocessors(q.device.index) * form.programs if q.is_cuda else INTERPRETED_PROGRAMS
    o = q.new_empty(N, T, H, D)
    if o.numel() == 0:
        return o
    parts = q.new_empty(programs + N * H_kv, rows, D, dtype=torch.float32)
    lses = parts.new_empty(programs + N * H_kv, rows)
    cut = {"SEQUENCES": triton.next_power_of_2(max(N, 1)), "PROGRAMS": programs}
    early = q.is_cuda and _launches_early(q.device.index)
    shape = {"T": T, "H_KV": H_kv, "GROUP": group, "D": D}

    def strides(x: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0) if x is None else x.stride()[:3]

    with gpu.on(q):
        split_kernel[(programs,)](
            q, k, v, k_scale, v_scale, lengths, block_tables, parts, lses, N, capacity, scale * LOG2_E,
            *strides(q), *strides(k), *strides(v), *strides(k_scale), *strides(v_scale),
            0 if block_tables is None else block_tables.stride(0),
            **shape, PAGE=page, ROWS=max(16, triton.next_power_of_2(rows)), BLOCK=form.block, **cut, EARLY=early,
            # a page's number comes before its keys: the pipeline needs two stages for each tile on its way
            num_warps=form.num_warps, num_stages=2 * form.num_stages - 1 if page else form.num_stages,
        )  # fmt: skip
        splits = min(64, triton.next_power_of_2(programs // max(1, N * H_kv) + 2))
        join_kernel[(N * H_kv * rows,)](
            parts, lses, lengths, o, N, capacity, **shape, SPLITS=splits, **cut, EARLY=early,
            num_warps=4, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return o


decode_op = torch.library.custom_op(
    "oncelm::decode_attention",
    _decode,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? block_tables, Tensor? k_scale, Tensor? v_scale, "
    "float scale, int programs) -> Tensor",
)


@decode_op.register_fake
def _shape(q, k, v, lengths, block_tables, k_scale, v_scale, scale, programs):
    return q.new_empty(q.shape)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_tables: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    *,
    programs: int = 0,
) -> Tensor:
    """`decode_attention` by the kernels; `programs`: how many share the work, 0 chooses.

    What `decode.fits_kernel` refuses runs the PyTorch form.
    """
    if not decode.fits_kernel(q, k):
        return decode.sdpa(q, k, v, lengths, block_tables, k_scale, v_scale, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    lengths = lengths.contiguous()
    if block_tables is not None:
        block_tables = block_tables.contiguous()
    return decode_op(q, k, v, lengths, block_tables, k_scale, v_scale, scale, programs)
