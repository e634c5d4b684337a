"""Settings of a run: values, recipes, and YAML that nobody meant."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncelm.train.config import CONSTRAINTS, TrainConfig
from oncelm.train.setup import describe_run
from oncelm.utils.settings import parse_yaml
from tests.fuzz.guard import JUNK, NUMBERS, WORDS, damaged_dict, damaged_text, draws, guarded

pytestmark = pytest.mark.slow
FOLDER = Path(mkdtemp(prefix="fuzz-"))
PLACES = {"data": str(FOLDER / "text.txt"), "out": str(FOLDER / "run")}
(FOLDER / "text.txt").write_text("the sea is deep\n" * 400)
RECIPE = TrainConfig(**PLACES, model_overrides={"window_size": 64, "rope_theta": 1e4}).to_yaml()


@draws(500)
@given(name=st.sampled_from(sorted(CONSTRAINTS)), value=st.sampled_from(NUMBERS) | JUNK)
def test_values(name, value) -> None:
    with guarded():
        config = TrainConfig(**PLACES | {name: value})
        assert parse_yaml(config.to_yaml(), "x")


@draws(400)
@given(data=st.data())
def test_overrides(data) -> None:
    names = [*CONSTRAINTS, "model_overrides.window_size", "model_overrides.x", "model_overrides.vocab_size"]
    words = st.sampled_from([*map(str, NUMBERS), *WORDS, "[", "{", "&a [*a]", "!!bool x", "1:9", "0x", "~", "? a"])
    override = st.builds("{}={}".format, st.sampled_from(names), words | st.text(max_size=9)) | st.text(max_size=12)
    with guarded():
        TrainConfig.from_yaml(None, data.draw(st.lists(override, max_size=3)), **PLACES)


@draws(300)
@given(recipe=damaged_text(RECIPE))
def test_recipes(recipe) -> None:
    (FOLDER / "recipe.yaml").write_bytes(recipe)
    with guarded():
        TrainConfig.from_yaml(FOLDER / "recipe.yaml", **PLACES)


@draws(300)
@given(text=st.text(alphabet="[]{}&*!?|>-:,#%@`'\"\n abc019.~", max_size=60))
def test_yaml(text) -> None:
    with guarded():
        parse_yaml(text, "recipe 'x'")


@draws(150)
@given(data=st.data())
def test_what_a_run_would_do(data) -> None:
    """--dry-run with shapes and sizes of all kinds."""
    shape = {"hidden_size": 128, "window_size": 64, "num_self_heads": 2, "rope_theta": 1e4, "vocab_size": 300}
    sizes = {"batch_size": 8, "seq_len": 64, "grad_accumulation": 1, "tensor_parallel": 1, "context_parallel": 1}
    with guarded():
        overrides = data.draw(damaged_dict(shape, ["layout", "self_decoder", "num_self_decoder_layers", "dtype"]))
        values = PLACES | sizes | data.draw(damaged_dict(sizes, [], 2)) | {"model_overrides": overrides}
        describe_run(TrainConfig.from_yaml(None, **values))


def test_the_recipe_itself_is_sound() -> None:
    assert json.dumps(parse_yaml(RECIPE, "x"))
    (FOLDER / "recipe.yaml").write_text(RECIPE)
    assert TrainConfig.from_yaml(FOLDER / "recipe.yaml").seq_len == 512
