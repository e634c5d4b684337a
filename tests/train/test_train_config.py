"""Settings: read from recipes and overrides, checked, and written back."""

from __future__ import annotations

import dataclasses
import math

import pytest

from oncelm.train.config import CONSTRAINTS, TrainConfig
from oncelm.utils.constraints import Number, Text, check_all

PLACES = {"data": "books", "out": "run"}


def load(*overrides: str):
    return TrainConfig.from_yaml(None, overrides, **PLACES)


def test_recipe_then_values_then_overrides(tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 10\nlr: 3e-4\nbatch_size: 4\nmodel_overrides: {window_size: 64}\n")
    config = TrainConfig.from_yaml(recipe, ["batch_size=16", "model_overrides.rope_theta=1e6"], **PLACES, steps=20)
    assert (config.steps, config.lr, config.batch_size) == (20, 3e-4, 16)
    assert config.model_overrides == {"window_size": 64, "rope_theta": 1e6}


def test_written_settings_read_back_the_same(tmp_path) -> None:
    config = load("betas=[0.9,0.99]", "grad_clip=null", "model_overrides.window_size=8", "lr=1")
    assert config.lr == 1.0
    assert config.grad_clip is None
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=5", r"unknown setting 'step'; did you mean 'steps'\?"),
        ("layer_types=[sliding_window]", r"is a key of the model, no setting: give it as model_overrides\.layer_types"),
        ("steps=many", "steps must be a whole number of at least 1, got 'many'"),
        ("steps=2.5", "steps must be a whole number of at least 1, got 2.5"),
        ("steps=true", "steps must be a whole number of at least 1, got True"),
        ("lr=fast", "lr must be a number above 0, got 'fast'"),
        ("lr=null", "lr must be a number above 0, got None"),
        ("resume=1", "resume must be true or false, got 1"),
        ("model=5", "model must be text, got 5"),
        ("betas=0.9", "betas must be a list of 2, a number of at least 0 and below 1 each, got 0.9"),
        ("betas=[0.9,x]", "betas\\[1\\] must be a number of at least 0 and below 1, got 'x'"),
        ("model_overrides=5", "model_overrides must be a dictionary"),
        ("betas=[0.9,1.0]", "betas\\[1\\] must be a number of at least 0 and below 1, got 1.0"),
        ("steps=0", "steps must be a whole number of at least 1, got 0"),
        ("batch_size=-1", "batch_size must be a whole number of at least 1"),
        ("lr=.nan", "lr must be a number above 0, got nan"),
        ("weight_decay=1e999", "weight_decay must be a number of at least 0, got inf"),
        ("seq_len=1", "seq_len must be a whole number of at least 2"),
        ("validation_fraction=0.9", "validation_fraction must be a number from 0 to 0.5"),
        ("schedule=cosin", "unknown schedule 'cosin'; did you mean 'cosine'"),
        ("dtype=float16", "unknown dtype 'float16'"),
        ("steps=null", "steps and max_seconds are both None"),
        ("target_loss=0", "target_loss must be a number above 0"),
        ("context_parallel=0", "context_parallel must be a whole number of at least 1"),
        ("tokenizer=bpe:big", "after 'bpe:' comes the vocabulary size"),
        ("batch_size=1e15", "are 512,000,000,000,000,000 tokens in one step; at most 268,435,456 are allowed"),
        ("grad_accumulation=1e9", "grad_accumulation 1000000000 times seq_len 512 are"),
        ("seq_len=1e30", "seq_len must be at most 9223372036854775807"),
        (f"lr=1{'0' * 400}", "lr must be a number above 0, got 1000"),
        (f"steps={'9' * 5000}", "is not valid YAML: Exceeds the limit"),
        ("min_lr=2", "min_lr must be from 0 to lr = 0.001, got 2"),
        ("model=''", "model must be text, got ''"),
        (r'data="a\0b"', "data must be text"),
        ("steps=!!bool x", "is not valid YAML"),
        ("steps=!!timestamp x", "is not valid YAML"),
        ("steps=2001-13-41", "is not valid YAML"),
        (f"lr={'[' * 5000}", "is nested too deeply"),
        ("model_overrides=&a {x: *a}", "holds itself, or more than 100,000 values"),
        ("tokenizer=bpe:99999999999", r"at least 260 \(4 specials, 256 bytes\) and at most 1,048,576, got 99999999999"),
        ("tokenizer=bpe:" + "9" * 5000, r"at most 1,048,576, got 9{20}\.\.\."),
        ("tokenizer=bpe:259", "the vocabulary size must be at least 260"),
        ("packing=4", "setting 'packing' is now called 'crossbatch_rows'"),
        ("chunk_parallel=2", "setting 'chunk_parallel' is now called 'context_parallel'"),
        ("lr", "must have the form key=value"),
        ("lr.x=1", "only model_overrides has inner keys"),
        ("lr=[", "override 'lr=\\[' is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(override)


def test_every_setting_has_a_constraint_that_its_default_fits() -> None:
    config = TrainConfig(**PLACES)
    assert set(CONSTRAINTS) == {entry.name for entry in dataclasses.fields(TrainConfig)}
    assert check_all(vars(config), CONSTRAINTS) == vars(config)


@pytest.mark.parametrize(
    "wrong",
    [math.nan, math.inf, -1, 1.5, "x", "", [[]], {1: 2}, 10**30, b"1", object()],
    ids=lambda wrong: str(wrong)[:12],
)
def test_a_wrong_value_of_any_setting_is_refused_by_name(wrong) -> None:
    for name, constraint in CONSTRAINTS.items():
        if isinstance(constraint, Number) and wrong in (1.5, 10**30):
            continue
        if isinstance(constraint, Text) and wrong == "x":
            continue
        with pytest.raises(ValueError, match=name):
            TrainConfig(**PLACES | {name: wrong})


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert load("steps=1e4").steps == 10_000


def test_data_is_needed_and_names_the_run() -> None:
    with pytest.raises(ValueError, match="data is missing"):
        TrainConfig.from_yaml(None, ["out=x"])
    for data in ("book", "some/book/", "some/book.txt", "/some/other/../book.txt"):
        assert TrainConfig.from_yaml(None, [f"data={data}"]).out == "runs/book"
    assert TrainConfig.from_yaml(None, ["data=book.txt", "out=here"]).out == "here"


def test_a_setting_in_python_is_checked_by_name_too() -> None:
    with pytest.raises(ValueError, match="setting 'within_documents' is now called 'document_masking'"):
        TrainConfig(**PLACES, within_documents=True)
    with pytest.raises(ValueError, match="did you mean 'seq_len'"):
        TrainConfig(**PLACES, seq_lens=8)


def test_a_recipe_of_before_is_read_with_a_warning(tmp_path, caplog) -> None:
    recipe = tmp_path / "config.yaml"
    recipe.write_text("validation_share: 0.1\ndecay_share: 0.3\nwithin_documents: true\n")
    config = TrainConfig.from_yaml(recipe, **PLACES)
    assert (config.validation_fraction, config.decay_fraction, config.document_masking) == (0.1, 0.3, True)
    assert "validation_share is now called validation_fraction, decay_share is" in caplog.text


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "a: [1"])
def test_a_recipe_that_is_no_mapping_is_named(tmp_path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=r"recipe .*recipe\.yaml"):
        TrainConfig.from_yaml(recipe, **PLACES)


def test_planned_steps_follow_the_count_and_the_clock() -> None:
    assert load("steps=50").planned_steps(10, 4.0) == 50
    timed = load("steps=null", "max_seconds=60")
    assert timed.planned_steps(0, 0.0) == float("inf")
    assert timed.planned_steps(10, 4.0) == 150
    assert load("steps=50", "max_seconds=60").planned_steps(10, 4.0) == 50


def test_a_target_loss_needs_evaluations() -> None:
    with pytest.raises(ValueError, match="target_loss is looked at in evaluations, and eval_every is None"):
        load("target_loss=2.5", "eval_every=null")


def test_compile_does_not_go_with_tensor_parallel() -> None:
    with pytest.raises(ValueError, match="compile does not go with tensor_parallel"):
        load("compile=true", "tensor_parallel=2")
