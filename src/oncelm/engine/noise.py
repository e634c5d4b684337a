"""Random draws that depend on nothing but a seed, a place and a token: Gumbel noise from a counter-based hash.

The largest of log p + Gumbel noise is a draw from p. The noise of token v at output index t of a request is a function
of (seed, t, v), so a request draws the same whatever runs beside it, in whatever order, and again after a preemption;
and a draft is right exactly if it is what the place draws by itself. The hash is of whole numbers and gives the same
bits on every device; the logarithms after it are the device's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

MASK = 2**64 - 1
# multipliers and shifts of "lowbias32" (Chris Wellons, "Prospecting for hash functions"), whose bias is the least known
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32
LARGEST = 1 - 2**-24  # below 1 in float32


def draw_keys(places: Sequence[tuple[int, int]]) -> np.ndarray:
    """For places of a seed and an index in an output: keys [m, 2] int32, a hash of both."""
    seeds, indices = np.array([(seed & MASK, index) for seed, index in places], dtype=np.uint64).T
    return _mix(_mix(seeds) + indices).view(np.int32).reshape(-1, 2)


def gumbel(keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise [m, V] float32 of tokens [V] int32 at places with keys [m, 2] int32 (`draw_keys`)."""
    bits = keys[:, :1] ^ tokens
    bits ^= _shifted(bits, 16)
    bits *= FIRST
    bits += keys[:, 1:]
    bits ^= _shifted(bits, 15)
    bits *= SECOND
    bits ^= _shifted(bits, 16)
    # u in (0, 1), exact near 0, where -log(1 - u) is smallest, which is what wins: there float32 has digits to spare
    u = bits.bitwise_and_(2**31 - 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=LARGEST)
    return u.neg_().log1p_().neg_().log_().neg_()


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """A shift of int32 to the right that brings in zeros, not the sign."""
    return (bits >> by).bitwise_and_((1 << (32 - by)) - 1)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, of uint64: every bit of x changes about half of the bits that come out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> 27) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> 31
