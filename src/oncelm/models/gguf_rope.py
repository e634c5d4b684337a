"""The scaling of RoPE that a GGUF file asks for, as `rope_parameters` of a Hugging Face config.

llama.cpp's converter writes linear and YaRN scaling as numbers (`llama.rope.scaling.*`), and Llama 3's as a tensor:
`rope_freqs.weight` divides each frequency. The four numbers that the tensor was made from are found again here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oncelm.utils.errors import check_choice, check_whole

BASE, CONTEXT = "llama.rope.freq_base", "llama.context_length"
TYPE, FACTOR, ORIGINAL = (f"llama.rope.scaling.{name}" for name in ("type", "factor", "original_context_length"))
OLD_FACTOR, FINETUNED = "llama.rope.scale_linear", "llama.rope.scaling.finetuned"
YARN = {  # to the names of Hugging Face; llama.cpp's converter writes their values as they are
    "llama.rope.scaling.yarn_attn_factor": "attention_factor",
    "llama.rope.scaling.yarn_beta_fast": "beta_fast",
    "llama.rope.scaling.yarn_beta_slow": "beta_slow",
}
NEUTRAL = {  # other values mean what Hugging Face's Llama does not compute
    "llama.rope.scaling.attn_factor": (1.0,),
    "llama.rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "llama.rope.scaling.yarn_log_multiplier": (0.0,),
}
KEYS = (BASE, TYPE, FACTOR, ORIGINAL, OLD_FACTOR, FINETUNED, *YARN, *NEUTRAL)
TENSOR = "rope_freqs.weight"
CLOSE = 2e-6  # relative; a few roundings of float32


def rope_parameters(
    path: str | os.PathLike[str], fields: Mapping[str, Any], head_dim: int, factors: np.ndarray | None
) -> dict[str, Any]:
    """The config's `rope_parameters`.

    Args:
        fields: the file's metadata.
        head_dim: the size D of a head.
        factors: the tensor `rope_freqs.weight`, (D/2,), if the file has one.

    Raises:
        ValueError: a scaling that Hugging Face's Llama cannot compute.
    """
    theta = _positive(path, fields, BASE, 10000.0)
    kind, factor = _kind_and_factor(path, fields)
    if factors is not None:
        if kind != "none":
            raise ValueError(f"{path} has {TENSOR} and {TYPE} {kind!r}: two scalings of RoPE.")
        return {"rope_theta": theta, **llama3_scaling(path, factors, theta, head_dim, fields[CONTEXT])}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        original = fields.get(ORIGINAL, fields[CONTEXT])
        check_whole(1, **{ORIGINAL: original})
        found["original_max_position_embeddings"] = original
        found |= {name: _positive(path, fields, key, 1.0) for key, name in YARN.items() if key in fields}
    return found


def llama3_scaling(
    path: str | os.PathLike[str], factors: np.ndarray, theta: float, head_dim: int, context: int
) -> dict[str, Any]:
    """The scaling of Llama 3 whose divisors of the frequencies are `factors`, (D/2,), to float32's precision."""
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or not (factors > 0).all():
        raise ValueError(f"{path}: {TENSOR} must be {head_dim // 2} numbers above 0, got shape {list(factors.shape)}.")
    wanted = factors.astype(np.float64)
    frequencies = float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)
    if np.allclose(wanted, 1, rtol=CLOSE, atol=0):
        return {"rope_type": "default"}
    for factor, low, high, original in _candidates(wanted, frequencies / (2 * math.pi), context):
        guess = {
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if np.allclose(_divisors(guess, frequencies), wanted, rtol=1e-4, atol=0) and np.allclose(
            _exact_divisors(guess, theta, head_dim), wanted, rtol=CLOSE, atol=0
        ):
            return {"rope_type": "llama3", **guess}
    raise ValueError(f"{path}: {TENSOR} is not a scaling of Llama 3's kind, and no other is known here.")


def _kind_and_factor(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> tuple[str, float]:
    """none, linear or yarn. As in llama.cpp, a factor alone is linear, and a factor of 0 is none."""
    for key, allowed in NEUTRAL.items():
        if key in fields and fields[key] not in allowed:
            raise ValueError(f"{path} has {key} {fields[key]}; allowed: {', '.join(map(str, allowed))}.")
    kind = fields.get(TYPE, "linear")
    check_choice(TYPE, kind, ("none", "linear", "yarn"))
    key = FACTOR if FACTOR in fields else OLD_FACTOR
    factor = 1.0 if fields.get(key) == 0 else _positive(path, fields, key, 1.0)
    if kind != "yarn":
        for name in (key for key in YARN if key in fields):
            raise ValueError(f"{path} has {name}, and {TYPE} {kind!r}; it goes with 'yarn'.")
    if kind == "none" or (kind == "linear" and factor == 1):
        return "none", 1.0
    return kind, factor


def _positive(path: str | os.PathLike[str], fields: Mapping[str, Any], key: str, default: float) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{path} has {key} {value!r}; it must be a number above 0.")
    return float(value)


def _divisors(scaling: Mapping[str, float], frequencies: np.ndarray) -> np.ndarray:
    """What Llama 3's scaling divides the frequencies, (D/2,), by."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / scaling["factor"] + kept)


def _exact_divisors(scaling: Mapping[str, float], theta: float, head_dim: int) -> np.ndarray:
    """The same by transformers, which is to use them."""
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **scaling},
    )
    plain = 1.0 / (theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)))
    return plain.astype(np.float64) / ROPE_INIT_FUNCTIONS["llama3"](config, None)[0].numpy()


def _candidates(
    divisors: np.ndarray, per_token: np.ndarray, context: int
) -> Iterator[tuple[float, float, float, int | float]]:
    """Scalings (factor, low, high, original context) to try, the published ones first.

    Frequencies between the two bounds keep a part that is a line in the turns per token, `per_token`: its slope and
    height give the bounds in tokens. Only ratios of (low, high, original) count, so low is 1 there.
    """
    largest = float(divisors.max())
    factors = list(dict.fromkeys([round(largest, 6), largest, 8.0, 32.0, 16.0, 4.0, 2.0, 64.0]))
    factors = [factor for factor in factors if factor >= largest * (1 - CLOSE) and factor > 1]
    powers = [2**exponent for exponent in range(3, 22)]
    contexts = list(dict.fromkeys([8192, context, *(round(context / factor) for factor in factors), *powers]))
    for original, factor in product((length for length in contexts if length > 0), factors):
        yield factor, 1.0, 4.0, original
    for factor in factors:
        kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
        between = (kept > CLOSE) & (kept < 1 - CLOSE)
        if between.sum() > 1:
            slope, height = np.polyfit(per_token[between], kept[between], 1)
            bounds = [(-slope / height, 1 - 1 / height)] if height < 0 else []
        else:
            bounds = list(_free_bounds(kept, per_token, between))
        for original, high in bounds:
            for digits in (0, 3):
                yield factor, 1.0, round(float(high), 4), round(float(original), digits) if digits else round(original)
            yield factor, 1.0, float(high), float(original)


def _free_bounds(kept: np.ndarray, per_token: np.ndarray, between: np.ndarray) -> Iterator[tuple[float, float]]:
    """(original context, high) where at most one frequency lies between the bounds, so that many fit."""
    if between.any():
        part, turns = float(kept[between][0]), float(per_token[between][0])
        for high in (8.0, 2.0, 1.5, 1.2, 1.1):
            yield (1 + part * (high - 1)) / turns, high
    elif (kept >= 0.5).any():
        shortest, longest = 1 / per_token[kept >= 0.5].min(), 1 / per_token[kept < 0.5].max()
        ratio = longest / shortest
        yield shortest * ratio ** (2 / 3), ratio ** (1 / 3)
    else:  # every frequency is divided by the factor
        yield 0.5 / float(per_token.max()), 4.0
