"""Configurations: what is refused, and what survives a round trip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from oncelm import YocoConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hiden_size": 64}, "did you mean 'hidden_size'"),
        ({"self_decoder": "retention"}, "did you mean 'gated_retention'"),
        ({"layout": "stack"}, "did you mean 'stacked'"),
        ({"rope_pairing": "halves"}, "did you mean 'half'"),
        ({"hidden_size": 100}, "does not split into num_self_heads"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
        ({"layout": "interleaved", "num_cross_decoder_layers": 3}, "as many of each"),
        ({"num_self_decoder_layers": 0, "num_cross_decoder_layers": 0}, "a model needs a layer"),
        ({"num_self_decoder_layers": "8"}, "num_self_decoder_layers must be a whole number of at least 0, got '8'"),
        ({"num_cross_decoder_layers": None}, "num_cross_decoder_layers must be a whole number of at least 0, got None"),
        ({"num_self_decoder_layers": 0, "layout": "unstacked"}, "needs self-decoder layers"),
        ({"num_self_key_value_heads": 1}, "leave num_self_key_value_heads out"),
        ({"window_size": 0}, "window_size must be a whole number of at least 1, got 0"),
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"layer_types": ["gated_retenton"]}, r"layer_types\[0\] 'gated_retenton'; did you mean 'gated_retention'"),
        ({"layer_types": ["sliding_attention"]}, "what others call 'sliding_attention' is 'sliding_window' here"),
        ({"self_decoder": "gated_deltanet"}, "self_decoder: what others call 'gated_deltanet' is 'gated_delta' here"),
        ({"self_decoder": "my_mixer"}, "A mixer of your own is known once its file has been imported"),
        ({"layer_types": "sliding_window"}, "layer_types must be a list, the name of a mixer each"),
        ({"layer_types": ["cross_attention", "sliding_window"]}, "layers of the self-decoder first"),
        ({"layer_types": ["sliding_window"], "num_cross_decoder_layers": 3}, "says num_cross_decoder_layers=0, got 3"),
        ({"layer_types": ["sliding_window"], "self_decoder": "gated_retention"}, "leave self_decoder out"),
        ({"layer_types": []}, "a model needs a layer"),
        ({"self_decoder": None}, "name the mixer of all layers with self_decoder, or of each with layer_types"),
        ({"vocab_size": -1}, "vocab_size must be a whole number of at least 1, got -1"),
    ],
)
def test_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        YocoConfig(**settings)


def test_round_trip(tmp_path: Path) -> None:
    config = YocoConfig(self_decoder="sliding_window", window_size=77, layout="unstacked", rope_theta=640000.0)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is YocoConfig
    for key in YocoConfig.own_keys():
        assert getattr(again, key) == getattr(config, key), key


def test_layer_types_follow_from_the_other_keys_or_say_them(tmp_path: Path) -> None:
    plain = YocoConfig(num_self_decoder_layers=2, num_cross_decoder_layers=2, layout="interleaved")
    assert plain.layer_types == ["gated_retention", "cross_attention"] * 2
    assert "layer_types" not in plain.to_dict()
    assert YocoConfig(layer_types=plain.layer_types).to_dict() == plain.to_dict()

    types = ["gated_retention", "sliding_window", "full_attention", "cross_attention", "cross_attention"]
    hybrid = YocoConfig(layer_types=types)
    assert (hybrid.num_self_decoder_layers, hybrid.num_cross_decoder_layers, hybrid.self_decoder) == (3, 2, None)
    hybrid.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.layer_types == types
    assert again.to_diff_dict() == hybrid.to_diff_dict()
    other = AutoConfig.from_pretrained(tmp_path, layer_types=["sliding_window", "cross_attention"])
    assert (other.num_hidden_layers, other.self_decoder) == (2, "sliding_window")


def test_layers_set_later_agree_or_are_refused() -> None:
    uniform = YocoConfig(num_self_decoder_layers=2, num_cross_decoder_layers=2)
    uniform.self_decoder, uniform.num_self_decoder_layers, uniform.layout = "full_attention", 3, "unstacked"
    assert uniform.layer_types == ["full_attention"] * 3 + ["cross_attention"] * 2
    hybrid = YocoConfig(layer_types=["gated_retention", "sliding_window", "cross_attention"])
    for config, key, value in (
        (uniform, "layer_types", ["sliding_window", "cross_attention"]),
        (hybrid, "layer_types", ["sliding_window", "cross_attention"]),
        (hybrid, "self_decoder", "sliding_window"),
        (hybrid, "num_self_decoder_layers", 4),
    ):
        with pytest.raises(ValueError, match=f"instead of setting {key}, make another"):
            setattr(config, key, value)
    hybrid.layer_types = list(hybrid.layer_types)
    other = YocoConfig.from_dict(hybrid.to_dict(), layer_types=["sliding_window", "cross_attention"])
    assert (other.self_decoder, other.num_self_decoder_layers) == ("sliding_window", 1)


def test_a_config_of_before_layer_types_loads(tmp_path: Path) -> None:
    keys = {"model_type": "oncelm_yoco", "self_decoder": "sliding_window", "num_self_decoder_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.layer_types == ["sliding_window"] * 3 + ["cross_attention"] * 6


def test_an_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    YocoConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"window_size"', '"windw_size"'))
    with pytest.raises(ValueError, match="did you mean 'window_size'"):
        AutoConfig.from_pretrained(tmp_path)
