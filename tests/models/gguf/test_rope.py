"""RoPE of GGUF files: the converted model's logits are those of the model that the file was made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oncelm
from oncelm.cli import main
from oncelm.models.gguf import read_gguf
from oncelm.models.gguf.rope import rope_parameters
from tests.models.gguf.files import gguf, llama3_factors, logits, make_llama, write

LONG = 400  # tokens of a window, so that scaled and plain RoPE are far apart
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def scaling(kind: str, factor: float, **more: float):
    def add(writer) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)
        for name, value in more.items():
            getattr(writer, f"add_rope_scaling_{name}")(value)

    return add


def factors(values: np.ndarray):
    return lambda writer: writer.add_tensor("rope_freqs.weight", values)


@pytest.mark.parametrize(
    ("rope", "more"),
    [
        (LLAMA3, None),
        (LLAMA3 | {"rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}, None),
        (LINEAR, scaling("linear", 4.0)),
        (LINEAR | {"factor": 2.5}, lambda writer: writer.add_float32("llama.rope.scaling.factor", 2.5)),
        (LINEAR, lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)),
        (YARN, scaling("yarn", 8.0, orig_ctx_len=64)),
        (YARN, scaling("yarn", 8.0, orig_ctx_len=64, finetuned=True, yarn_ext_factor=1.0, yarn_log_mul=0.0)),
        (
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.75},
            scaling("yarn", 8.0, orig_ctx_len=64, yarn_beta_fast=16.0, yarn_beta_slow=2.0, yarn_attn_factor=0.75),
        ),
        ({"rope_type": "default", "rope_theta": 10000.0}, scaling("none", 4.0)),
        ({"rope_type": "default", "rope_theta": 10000.0}, scaling("linear", 1.0)),
    ],
)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_logits_and_parameters_are_the_models(rope, more, head_dim, tmp_path) -> None:
    model = make_llama(rope_parameters=rope, head_dim=head_dim, max_position_embeddings=512)
    write(model, tmp_path / "m.gguf", more=more or factors(llama3_factors(model)))
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 0
    converted = oncelm.load(tmp_path / "out")
    torch.testing.assert_close(logits(converted, LONG), logits(model, LONG), rtol=0, atol=2e-4)
    memory = oncelm.load(tmp_path / "out", mem_layers=[1], last_context_length=512)
    torch.testing.assert_close(logits(memory, LONG), logits(model, LONG), rtol=0, atol=2e-4)
    if head_dim == 64:  # enough frequencies to find the parameters themselves
        assert converted.config.rope_parameters == rope
    if rope["rope_type"] != "default":
        plain = make_llama(rope_theta=rope["rope_theta"], head_dim=head_dim, max_position_embeddings=512)
        assert (logits(plain, LONG) - logits(model, LONG)).abs().max() > 0.1


@settings(max_examples=25, deadline=None)
@given(
    theta=st.sampled_from([10000.0, 500000.0, 1e6]),
    factor=st.floats(1.5, 64, width=32),
    low=st.floats(0.5, 4, width=32),
    ratio=st.floats(1.1, 8),
    length=st.integers(16, 32768),
    head_dim=st.sampled_from([8, 16, 64, 128]),
)
def test_every_scaling_of_llama3s_kind_is_kept(theta, factor, low, ratio, length, head_dim) -> None:
    """The frequencies come back, as Llama 3's scaling or as a list."""
    rope = LLAMA3 | {"rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": low * ratio}
    rope["original_max_position_embeddings"] = length
    model = make_llama(rope_parameters=rope, head_dim=head_dim, hidden_size=8, intermediate_size=8, vocab_size=8)
    found = rope_parameters({"llama.rope.freq_base": theta}, head_dim, 131072, llama3_factors(model))
    again = make_llama(rope_parameters=found, head_dim=head_dim, hidden_size=8, intermediate_size=8, vocab_size=8)
    wanted = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, wanted, rtol=2e-6, atol=0)
    assert again.model.rotary_emb.attention_scaling == 1.0


def test_the_scaling_of_llama_3_itself() -> None:
    for factor in (8.0, 32.0):
        rope = LLAMA3 | {"rope_theta": 500000.0, "factor": factor, "original_max_position_embeddings": 8192}
        small = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "head_dim": 64 if factor == 32 else 128}
        values = llama3_factors(make_llama(rope_parameters=rope, **small))
        assert rope_parameters({"llama.rope.freq_base": 500000.0}, small["head_dim"], 131072, values) == rope


def test_factors_of_no_formula_are_kept_as_they_are(tmp_path) -> None:
    values = np.array([1, 3, 2, 9, 4, 0.5, 7, 8], np.float32)
    write(make_llama(max_position_embeddings=512), tmp_path / "m.gguf", more=factors(values))
    model, _ = read_gguf(tmp_path / "m.gguf")
    plain = make_llama().model.rotary_emb.inv_freq
    for length in (100, 9000):
        rotary = model.model.rotary_emb
        rotary(torch.zeros(1), torch.arange(length)[None])
        torch.testing.assert_close(rotary.inv_freq, plain / torch.from_numpy(values), rtol=1e-6, atol=0)
        assert rotary.attention_scaling == 1.0


def test_factors_that_are_all_the_same(tmp_path) -> None:
    for value, rope in ((1.0, {"rope_type": "default"}), (4.0, {"rope_type": "linear", "factor": 4.0})):
        write(make_llama(), tmp_path / "m.gguf", more=factors(np.full(8, value, np.float32)))
        assert read_gguf(tmp_path / "m.gguf")[0].config.rope_parameters == {"rope_theta": 5000.0} | rope


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (scaling("longrope", 4.0), "unknown llama.rope.scaling.type 'longrope'; .*Allowed: none, linear, yarn"),
        (scaling("linear", float("inf")), "llama.rope.scaling.factor must be a finite number, got inf"),
        (lambda w: w.add_string("llama.rope.scaling.factor", "8"), "llama.rope.scaling.factor must be a finite number"),
        (scaling("linear", -2.0), "llama.rope.scaling.factor must be a number above 0, got -2.0"),
        (scaling("yarn", 4.0, orig_ctx_len=0), "original_context_length must be a whole number of at least 1, got 0"),
        (scaling("yarn", 4.0, yarn_ext_factor=0.5), "llama.rope.scaling.yarn_ext_factor 0.5"),
        (scaling("yarn", 4.0, yarn_log_mul=0.1), "llama.rope.scaling.yarn_log_multiplier 0.1"),
        (scaling("yarn", 4.0, attn_factors=1.2), "llama.rope.scaling.attn_factor 1.2"),
        (lambda w: w.add_float32("llama.rope.scaling.alpha", 1000.0), "llama.rope.scaling.alpha 1000.0"),
        (factors(np.ones(4, np.float32)), "rope_freqs.weight must be 8 numbers above 0"),
        (factors(np.zeros(8, np.float32)), "rope_freqs.weight must be 8 numbers above 0"),
        (
            lambda w: (factors(np.arange(1, 9, dtype=np.float32))(w), scaling("linear", 4.0)(w)),
            "'linear' beside rope_freqs.weight",
        ),
    ],
)
def test_what_is_refused(more, message, tmp_path) -> None:
    write(make_llama(), tmp_path / "m.gguf", more=more)
    with pytest.raises(ValueError, match=message) as refused:
        read_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(refused.value)
