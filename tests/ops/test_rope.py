"""RoPE in both pairings and both spacings, against the definition in complex numbers."""

from __future__ import annotations

import cmath

import pytest
import torch

from oncelm.ops import apply_rope, rope_frequencies, rope_rotation


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("spacing", ["inclusive", "standard"])
def test_definition(pairing: str, spacing: str) -> None:
    D, theta, T = 8, 100.0, 5
    x = torch.randn(1, T, 1, D, dtype=torch.float64)
    frequencies = rope_frequencies(D, theta, spacing)
    got = apply_rope(x, rope_rotation(torch.arange(T)[None], frequencies), pairing)
    for t in range(T):
        for j in range(D // 2):
            exponent = j / (D / 2 - 1) if spacing == "inclusive" else 2 * j / D
            a, b = (2 * j, 2 * j + 1) if pairing == "interleaved" else (j, j + D // 2)
            turned = complex(x[0, t, 0, a], x[0, t, 0, b]) * cmath.exp(1j * t * theta**-exponent)
            assert abs(complex(got[0, t, 0, a], got[0, t, 0, b]) - turned) < 1e-6


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16)
    frequencies = rope_frequencies(16, 10000.0, "inclusive")

    def score(i: int, j: int) -> torch.Tensor:
        at = [rope_rotation(torch.tensor([[p]]), frequencies) for p in (i, j)]
        return (apply_rope(q, at[0], "interleaved") * apply_rope(k, at[1], "interleaved")).sum()

    torch.testing.assert_close(score(9, 4), score(109, 104), rtol=1e-4, atol=1e-4)


def test_dtype_is_kept_and_angles_are_float32() -> None:
    x = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    rotation = rope_rotation(torch.arange(3)[None], rope_frequencies(8, 10000.0, "standard"))
    assert rotation.dtype == torch.float32
    assert apply_rope(x, rotation, "half").dtype == torch.bfloat16


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="did you mean 'inclusive'"):
        rope_frequencies(8, 10000.0, "inclusiv")
    with pytest.raises(ValueError, match="even head_dim"):
        rope_frequencies(7, 10000.0, "standard")
