"""Configurations: what is refused, and what survives a round trip."""

from __future__ import annotations

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


def test_an_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    YocoConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"window_size"', '"windw_size"'))
    with pytest.raises(ValueError, match="did you mean 'window_size'"):
        AutoConfig.from_pretrained(tmp_path)
