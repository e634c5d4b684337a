"""RoPE scaling in GGUF files: the logits of the model that the file was made from, or a refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import oncelm
from oncelm.cli import main
from oncelm.models.gguf import read_gguf
from oncelm.models.gguf_rope import llama3_scaling
from tests.models.gguf_files import gguf, logits, make_llama, write

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def factors(scaling, theta: float, head_dim: int) -> np.ndarray:
    """The tensor that llama.cpp's converter writes, (D/2,)."""
    low, high, original = (scaling[name] for name in list(LLAMA_3)[1:])
    found = []
    for frequency in 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
        turns = original * float(frequency) / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - kept) / scaling["factor"] + kept))
    return np.array(found, dtype=np.float32)


def yarn(writer, **more: float) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)
    for name, value in more.items():
        writer.add_float32(f"llama.rope.scaling.{name}", value)


def linear(writer) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, linear),
    "linear, old key": (
        {"rope_type": "linear", "factor": 4.0},
        lambda w: w.add_float32("llama.rope.scale_linear", 4.0),
    ),
    "a factor alone": ({"rope_type": "linear", "factor": 2.5}, lambda w: w.add_rope_scaling_factor(2.5)),
    "none": ({"rope_type": "default"}, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE)),
    "yarn": (YARN, yarn),
    "yarn, all numbers": (
        YARN | {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0},
        lambda w: yarn(w, yarn_attn_factor=1.5, yarn_beta_fast=16.0, yarn_beta_slow=2.0, yarn_ext_factor=1.0),
    ),
    "llama3": (
        {"rope_type": "llama3", **LLAMA_3},
        lambda w: w.add_tensor("rope_freqs.weight", factors(LLAMA_3, 5000.0, 16)),
    ),
    "factors of one": ({"rope_type": "default"}, lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_scaled_model(case, tmp_path) -> None:
    parameters, add = CASES[case]
    original = make_llama(rope_parameters={"rope_theta": 5000.0, **parameters})
    write(original, tmp_path / "model.gguf", more=add)
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 0
    model = oncelm.load(tmp_path / "out")
    assert model.config.rope_parameters == {"rope_theta": 5000.0, **parameters}
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-4)
    if parameters["rope_type"] != "default":  # the scaling matters here
        assert (logits(make_llama()) - logits(original)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope.scaling.type 'longrope'"),
        (
            lambda w: w.add_rope_scaling_factor(float("nan")),
            "llama.rope.scaling.factor nan; it must be a number above 0",
        ),
        (lambda w: w.add_rope_scaling_factor(-2.0), "llama.rope.scaling.factor -2.0"),
        (lambda w: yarn(w, attn_factor=0.5), "llama.rope.scaling.attn_factor 0.5; allowed: 1.0"),
        (lambda w: yarn(w, yarn_ext_factor=0.5), "llama.rope.scaling.yarn_ext_factor 0.5; allowed: 1.0, -1.0"),
        (lambda w: yarn(w, yarn_log_multiplier=0.1), "llama.rope.scaling.yarn_log_multiplier"),
        (lambda w: w.add_rope_scaling_yarn_beta_fast(16.0), "yarn_beta_fast, and llama.rope.scaling.type 'linear'"),
        (lambda w: w.add_uint32("llama.rope.scaling.alpha", 3), "has llama.rope.scaling.alpha, which is not known"),
        (
            lambda w: (linear(w), w.add_tensor("rope_freqs.weight", factors(LLAMA_3, 5000.0, 16))),
            "two scalings of RoPE",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 2, 1, 3, 1, 1, 1, 1], np.float32)),
            "not a scaling of Llama 3's kind",
        ),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "must be 8 numbers above 0"),
    ],
)
def test_other_scalings_are_refused(add, message, tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", more=add)
    with pytest.raises(ValueError, match=message) as refused:
        read_gguf(tmp_path / "model.gguf")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("factor", "head_dim", "original"), [(8.0, 128, 8192), (32.0, 64, 8192), (16.0, 128, 4096)])
def test_the_published_scalings_are_found_exactly(factor, head_dim, original) -> None:
    scaling = LLAMA_3 | {"factor": factor, "original_max_position_embeddings": original}
    found = llama3_scaling("file", factors(scaling, 500000.0, head_dim), 500000.0, head_dim, 131072)
    assert found == {"rope_type": "llama3", **scaling}


@given(
    factor=st.sampled_from([2.0, 3.5, 8.0, 32.0]),
    low=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    above=st.floats(0.25, 10),
    original=st.integers(16, 20000),
    head_dim=st.sampled_from([8, 16, 64, 128]),
)
def test_any_scaling_gives_its_frequencies(factor, low, above, original, head_dim) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + above,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(head_dim=head_dim)

    def frequencies(parameters):
        config.rope_parameters = {"rope_theta": 10000.0, **parameters}
        return ROPE_INIT_FUNCTIONS["llama3"](config, None)[0]

    found = llama3_scaling("file", factors(scaling, 10000.0, head_dim), 10000.0, head_dim, 4096)
    if found["rope_type"] == "default":  # nothing was scaled
        found = LLAMA_3 | {"factor": 1.0}
    torch.testing.assert_close(frequencies(found), frequencies({"rope_type": "llama3", **scaling}), rtol=5e-6, atol=0)
