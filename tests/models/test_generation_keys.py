"""generation_config.json: whatever in it no generation could follow is refused when the model is loaded."""

from __future__ import annotations

import json
import math

import pytest
from transformers import GenerationConfig

import oncelm
from oncelm.models.generation_keys import CONSTRAINTS, check_generation
from oncelm.models.load import quiet_transformers
from tests.models.small import make_long, make_model

# checked by transformers itself, objects of its own, or of no meaning in a file
ELSEWHERE = {
    *("early_stopping", "compile_config", "continuous_batching_config", "constraints", "dola_layers", "sequence_bias"),
    *("transformers_version",),
}


def test_every_key_is_checked_and_its_default_fits() -> None:
    keys = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
    assert keys - ELSEWHERE <= CONSTRAINTS.keys()
    for key, value in GenerationConfig._get_default_generation_params().items():
        if value is not None and key not in ELSEWHERE:
            CONSTRAINTS[key](key, value)


@pytest.mark.parametrize("make", [lambda: make_model("retention"), make_long], ids=["yoco", "longllama"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number of at least -1, or a list"),
        ({"eos_token_id": ["</s>", 2]}, r"eos_token_id\[0\] must be a whole number of at least -1, got '</s>'"),
        ({"eos_token_id": 1.5}, "eos_token_id must be a whole number"),
        ({"pad_token_id": "x"}, "pad_token_id must be a whole number"),
        ({"temperature": "hot"}, "temperature must be a number of at least 0, got 'hot'"),
        ({"temperature": math.nan}, "temperature must be a number of at least 0, got nan"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list"),
        ({"bad_words_ids": [[1], 2]}, r"bad_words_ids\[1\] must be a list"),
        ([1], "must hold a JSON object, got"),
        ({"stop_strings": [1]}, r"stop_strings\[0\] must be text"),
        ({"watermarking_config": 5}, "watermarking_config must be a dictionary"),
    ],
)
def test_a_wrong_value_is_named(make, changes, message, tmp_path) -> None:
    with quiet_transformers():
        make().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=message) as error:
        oncelm.load(tmp_path, "cpu")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_meant_is_allowed() -> None:
    check_generation("x", vars(GenerationConfig(eos_token_id=[2, 5], temperature=0.6, top_p=0.9, do_sample=True)))
    check_generation("x", vars(GenerationConfig(pad_token_id=-1, max_length=4096, stop_strings="a", num_beams=4)))
