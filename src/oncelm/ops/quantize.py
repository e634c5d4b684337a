"""Keys and values in 8 bits: one float32 scale a vector."""

from __future__ import annotations

import torch

# dtype -> its largest number, which the largest element of every vector becomes
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """x, or its bytes where its elements are bytes: what has to be indexed on any device, which float8 cannot."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def quantize_kv(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors in 8 bits: x is about values * scales[..., None].

    Args:
        x: [..., D] finite floats.
        dtype: torch.float8_e4m3fn (3 bits of mantissa: errors of at most 1/16 of an element, down to 1/28,000 of the
            vector's largest) or torch.int8 (errors of at most 1/254 of the largest element).

    Returns:
        values [..., D] of `dtype`, scales [...] float32. Vectors of zeros stay zeros.
    """
    if dtype not in LARGEST:
        raise ValueError(f"quantize_kv makes {', '.join(map(str, LARGEST))}; dtype {dtype} is none of them.")
    x = x.float()
    scales = (x.abs().amax(-1) / LARGEST[dtype]).clamp(min=SMALLEST_SCALE)
    values = (x / scales[..., None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (values if dtype.is_floating_point else values.round()).to(dtype), scales


def dequantize_kv(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, to rounding: values [..., D] and scales [...] -> [..., D] of `dtype`."""
    return (values.float() * scales[..., None]).to(dtype)
