"""Decode attention on a GPU: few queries a sequence, a long cache; every key and value is read once.

Whatever lengths a batch mixes and however much larger the cache is than what it holds, all multiprocessors read the
same number of bytes, and the launch depends on shapes alone, so that a CUDA graph can hold it. How, says
decode_kernels.py; here is in which form the kernels are compiled, and their launch.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from oncelm.ops import gpu
from oncelm.ops.attention import decode
from oncelm.ops.attention.decode_kernels import join_kernel, split_kernel

Tensor = torch.Tensor

LOG2_E = 1.4426950408889634
INTERPRETED_PROGRAMS = 7  # under TRITON_INTERPRET=1


@dataclass(frozen=True)
class Config:
    """How split_kernel is compiled and launched: keys a tile, warps, pipeline stages, programs a multiprocessor."""

    block: int
    num_warps: int
    num_stages: int
    programs: int


# largest head dimension -> most rows -> Config, for 16-bit queries. Those of dimension 128 with up to 8 rows are from a
# sweep on an H200 (docs/performance.md); of the others the compiler's registers and shared memory are known, no times
SIXTEEN_BITS = {
    64: {64: Config(64, 4, 3, 2), 128: Config(32, 8, 2, 1)},
    128: {32: Config(64, 4, 3, 2), 64: Config(32, 4, 4, 2), 128: Config(32, 8, 2, 1)},
    256: {32: Config(32, 4, 3, 2), 128: Config(32, 8, 2, 1)},
}
EIGHT_BITS = {
    128: {
        8: Config(64, 2, 4, 4),
        16: Config(64, 2, 3, 4),
        32: Config(64, 4, 3, 2),
        64: Config(32, 4, 4, 2),
        128: Config(32, 8, 3, 1),
    },
    256: {8: Config(32, 2, 4, 4), 16: Config(32, 2, 3, 4), 64: Config(32, 8, 3, 1), 128: Config(16, 8, 3, 1)},
}
FULL_PRECISION = Config(16, 8, 2, 2)  # float32 runs on the vector units, operands in registers: small tiles


def config(q: Tensor, k: Tensor, rows: int) -> Config:
    """The form for these inputs and `rows` queries that share a head. Pages or not: the same, so the bits are too."""
    if q.dtype == torch.float32:
        return FULL_PRECISION
    dims = EIGHT_BITS if k.itemsize == 1 else SIXTEEN_BITS
    forms = next(forms for dim, forms in dims.items() if q.shape[-1] <= dim)
    return next(form for most, form in forms.items() if rows <= most)


def _launches_early(index: int | None) -> bool:
    """Whether join_kernel may be launched before split_kernel has ended (programmatic dependent launch, Hopper on)."""
    return torch.version.hip is None and gpu.capability(index) >= (9, 0)


def _readable(x: Tensor) -> Tensor:
    """Keys or values as the kernel reads them: a token's numbers side by side, 8-bit ones as pairs, a tile in 2^31."""
    steps = (x.data_ptr(), *x.stride()[:3]) if x.itemsize == 1 else ()
    if x.stride(-1) == 1 and x.stride(1) < 1 << 24 and not any(step % 2 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _decode(q, k, v, lengths, block_tables, k_scale, v_scale, scale, programs):
    N, T, H, D = q.shape
    H_kv, page = k.shape[2], 0 if block_tables is None else k.shape[1]
    capacity = page * block_tables.shape[1] if page else k.shape[1]
    group = H // H_kv
    rows = T * group
    form = config(q, k, rows)
    if not programs:
        programs = gpu.multiprocessors(q.device.index) * form.programs if q.is_cuda else INTERPRETED_PROGRAMS
    o = q.new_empty(N, T, H, D)
    if o.numel() == 0:
        return o
    if scale < 0:  # the kernel looks for the largest score before it scales them
        q, scale = -q, -scale
    k, v = _readable(k), _readable(v)
    parts = q.new_empty(programs + N * H_kv, rows, D, dtype=torch.float32)
    lses = parts.new_empty(programs + N * H_kv, rows)
    cut = {"BLOCK": form.block, "SEQUENCES": triton.next_power_of_2(max(N, 1)), "PROGRAMS": programs}
    early = q.is_cuda and _launches_early(q.device.index)
    shape = {"T": T, "H_KV": H_kv, "GROUP": group, "D": D}
    pairs = k.itemsize == 1 and q.dtype != torch.float32 and D >= 32  # a product takes 16 numbers or more at a time

    def strides(x: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0) if x is None else x.stride()[:3]

    with gpu.on(q):
        split_kernel[(programs,)](
            q, k, v, k_scale, v_scale, lengths, block_tables, parts, lses, N, capacity, scale * LOG2_E,
            *strides(q), *strides(k), *strides(v), *strides(k_scale), *strides(v_scale),
            0 if block_tables is None else block_tables.stride(0),
            **shape, PAGE=page, ROWS=max(16 if form.num_warps >= 4 else 8, triton.next_power_of_2(rows)), **cut,
            PAIRS=pairs, ASM=q.is_cuda and torch.version.hip is None, EARLY=early, num_warps=form.num_warps,
            # where each key has a page of its own, that number comes before it: two stages for a tile on its way
            num_stages=2 * form.num_stages - 1 if 0 < page < form.block else form.num_stages,
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
    q = q if q.stride(-1) == 1 else q.contiguous()
    lengths = lengths.contiguous()
    if block_tables is not None:
        block_tables = block_tables.contiguous()
    return decode_op(q, k, v, lengths, block_tables, k_scale, v_scale, scale, programs)
