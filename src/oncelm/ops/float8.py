"""Matrix products in float8 (e4m3) of 16-bit operands, one scale a row of either: twice bfloat16's rate on an H100.

A row is divided by its largest magnitude / 448, so that it just fits, and rounded to 3 bits of mantissa: each element
is off by up to 1/16 of itself, and elements below about 1e-5 of the row's largest become zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_MAXIMUM = 1e-12  # that a row is taken to have: a row of zeros needs a scale too


class Float8Rows(NamedTuple):
    """values [..., K] float8_e4m3fn times scales [..., 1] float32."""

    values: torch.Tensor
    scales: torch.Tensor


def round_rows(x: torch.Tensor) -> Float8Rows:
    """x [..., K] of any floating dtype, rounded."""
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_MAXIMUM) / LARGEST
    return Float8Rows((wide / scales).to(torch.float8_e4m3fn), scales)


def linear_float8(x: Float8Rows, weight: Float8Rows, dtype: torch.dtype) -> torch.Tensor:
    """x W^T for x [..., K] and weight [N, K], K, N multiples of 16: [..., N] in `dtype`, bfloat16; sums in float32."""
    values, scales = x.values.flatten(0, -2), x.scales.flatten(0, -2)
    out = torch._scaled_mm(
        values,
        weight.values.t(),
        scale_a=scales,
        scale_b=weight.scales.t(),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.unflatten(0, x.values.shape[:-1])


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """ValueError unless the device multiplies float8 rows to `dtype`: an NVIDIA GPU of compute capability 9.0 or more,
    and bfloat16."""
    if device.type != "cuda":
        raise ValueError(f"float8 matrix products need an NVIDIA GPU (H100 or later); the model is on {device.type!r}.")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (9, 0):
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"float8 matrix products need compute capability 9.0 (H100) or more; {name} has {major}.{minor}."
        )
    if dtype != torch.bfloat16:  # which is all that products with a scale a row give
        raise ValueError(f"float8 matrix products need a model in bfloat16; this one is in {dtype}.")
