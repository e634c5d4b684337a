"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the conventions of YOCO and of LLaMA.

Two independent choices tell implementations apart, and weights trained with one do not work with another:

- which dimensions form a pair: "interleaved" (2j, 2j + 1) or "half" (j, j + D/2);
- the frequencies: "inclusive" theta ** (-j / (D/2 - 1)), official YOCO, or "standard" theta ** (-2j / D), LLaMA.
"""

from __future__ import annotations

import torch

from oncelm.utils.errors import check_choice

PAIRINGS = ("interleaved", "half")
SPACINGS = ("inclusive", "standard")


def rope_frequencies(
    head_dim: int, theta: float, spacing: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """Angle per position of each pair: [D/2], float32."""
    check_choice("RoPE spacing", spacing, SPACINGS)
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"RoPE needs an even head_dim of at least 2, got {head_dim}.")
    pairs = head_dim // 2
    if spacing == "inclusive":
        exponents = torch.linspace(0, 1, pairs, dtype=torch.float32, device=device)
    else:
        exponents = torch.arange(pairs, dtype=torch.float32, device=device) / pairs
    return 1.0 / (theta**exponents)


def rope_rotation(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """cos, sin of position * frequency: float32 [..., T, D/2, 2] for positions [..., T]; made once for all layers."""
    angles = positions.to(torch.float32)[..., None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: torch.Tensor, rotation: torch.Tensor, pairing: str) -> torch.Tensor:
    """Rotate x [B, T, H, D] by rotation [B or 1, T, D/2, 2]; computed in float32 or wider, returned in x's dtype."""
    rotation = rotation[..., None, :, :]  # the same for all heads
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if pairing == "interleaved" and not torch.compiler.is_compiling():
        # a pair of neighbours is a complex number as it stands in memory: one pass, but none that a compiler can fuse
        turned = _as_complex(wide.unflatten(-1, (-1, 2))) * _as_complex(rotation)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cos, sin = rotation.unbind(-1)
    if pairing == "interleaved":
        pairs = wide.unflatten(-1, (-1, 2))
        across = torch.stack((-sin, sin), dim=-1)  # (a, b) -> (a cos - b sin, b cos + a sin)
        return (pairs * cos[..., None] + pairs.flip(-1) * across).flatten(-2).to(x.dtype)
    real, imaginary = wide.chunk(2, dim=-1)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1).to(x.dtype)


def _as_complex(pairs: torch.Tensor) -> torch.Tensor:
    """pairs [..., 2] as complex numbers [...]: a view, or a copy where they do not lie in memory as such."""
    *strides, last = pairs.stride()
    if last != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in strides):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)
