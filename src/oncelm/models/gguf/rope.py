"""RoPE as a GGUF file says it, as transformers' `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oncelm.utils.errors import check_choice, check_positive, check_whole

ROPE = "llama.rope."
SCALING = f"{ROPE}scaling."
TYPES = ("none", "linear", "yarn")
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
USUAL_LENGTH = 8192  # of Llama 3 before its RoPE was scaled
USUAL_FACTORS = (8.0, 32.0, 4.0, 16.0, 2.0)


def rope_parameters(
    metadata: dict[str, Any], head_dim: int, context: int, factors: np.ndarray | None
) -> dict[str, Any]:
    """The parameters with which transformers' LLaMA rotates as the model did that the file was made from.

    Args:
        metadata: of the file.
        head_dim: of the model.
        context: the length in tokens that the file names.
        factors: (head_dim / 2,) by which frequencies are divided, the tensor `rope_freqs.weight`; None without it.

    Raises:
        ValueError: a kind of scaling that is not known here, or two at once.
    """
    theta = _number(metadata, f"{ROPE}freq_base", 10000.0)
    check_positive(**{f"{ROPE}freq_base": theta})
    plain = {"rope_theta": theta, "rope_type": "default"}
    scaled = _scaled(metadata, context)
    if factors is None:
        return plain | scaled
    if scaled:
        raise ValueError(f"{SCALING}type {scaled['rope_type']!r} beside rope_freqs.weight: only one of them.")
    return plain | _of_factors(factors.astype(np.float64), theta, head_dim)


def shortest(number: float) -> float:
    """The decimal number that was written as this float32: 1e-05, where its bits say 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _scaled(metadata: dict[str, Any], context: int) -> dict[str, Any]:
    """What `rope.scaling.*` says; empty where it scales nothing."""
    kind = metadata.get(f"{SCALING}type", "linear")  # llama.cpp's default: then the factor alone decides
    check_choice(f"{SCALING}type", kind, TYPES)
    factor = _number(metadata, f"{SCALING}factor", _number(metadata, f"{ROPE}scale_linear", 0.0))
    if kind == "none" or factor == 0 or (kind == "linear" and factor == 1):
        return {}
    check_positive(**{f"{SCALING}factor": factor})
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    original = metadata.get(f"{SCALING}original_context_length", context)
    check_whole(1, **{f"{SCALING}original_context_length": original})
    given = {ours: _number(metadata, SCALING + key, 0.0) for key, ours in YARN.items() if SCALING + key in metadata}
    check_positive(**given)
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original, **given}


def _number(metadata: dict[str, Any], key: str, default: float) -> float:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}.")
    return shortest(value)


def _of_factors(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that divides frequency j by `factors[j]`: Llama 3's where its formula gives them.

    Otherwise the factors themselves, as transformers' longrope holds them, whatever the length.
    """
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError(f"rope_freqs.weight must be {head_dim // 2} numbers above 0, got {factors.tolist()[:4]}, ...")
    if np.ptp(factors) == 0:
        return {} if factors[0] == 1 else {"rope_type": "linear", "factor": shortest(factors[0])}
    wanted = 1 / (factors * theta ** (np.arange(0, head_dim, 2) / head_dim))  # radians a token
    for guess in _llama3(factors, wanted * factors / (2 * math.pi)):
        config = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            rope_parameters={"rope_theta": theta, **guess},
        )
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if np.allclose(found.numpy(), wanted, rtol=1e-6, atol=0):  # float32's rounding
            return guess
    listed = [shortest(factor) for factor in factors]
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": USUAL_LENGTH,
    }


def _llama3(factors: np.ndarray, turns: np.ndarray) -> Iterator[dict[str, Any]]:
    """Parameters of Llama 3's scaling that may have given these factors, likely ones first.

    Frequencies of fewer than `low` turns a token are divided by F, those of more than `high` are left alone; between,
    1 / factor is a line over the turns. `low` and `high` are the parameters `low_freq_factor` and `high_freq_factor`
    over the original length; only these quotients matter, so `low_freq_factor` is 1 where the length is then whole.

    Args:
        factors: (head_dim / 2,).
        turns: a token, of the unscaled frequencies (head_dim / 2,).
    """
    largest = float(factors.max())
    for factor in (largest, *(usual for usual in USUAL_FACTORS if usual > largest)):
        between = (factors > 1) & (factors < factor)
        if between.sum() >= 2:
            slope, start = np.polyfit(turns[between], 1 / factors[between], 1)
            low, high = (1 / factor - start) / slope, (1 - start) / slope
        elif between.any():  # one point of the line: take Meta's high = 4 * low
            share = (1 / factors[between][0] - 1 / factor) / (1 - 1 / factor)
            low = turns[between][0] / (1 + 3 * share)
            high = 4 * low
        elif factors.min() == 1:  # none: any step in the gap between the two groups
            below, above = turns[factors > 1].max(), turns[factors == 1].min()
            ratio = min(4.0, math.sqrt(above / below))
            low = math.sqrt(below * above / ratio)
            high = ratio * low
        else:
            continue
        if not 0 < low < high:
            continue
        for length, low_factor, high_factor in (
            (max(1, round(1 / low)), 1.0, round(high / low, 3)),
            (USUAL_LENGTH, USUAL_LENGTH * low, USUAL_LENGTH * high),
        ):
            yield {
                "rope_type": "llama3",
                "factor": shortest(factor),
                "low_freq_factor": float(low_factor),
                "high_freq_factor": float(high_factor),
                "original_max_position_embeddings": length,
            }
