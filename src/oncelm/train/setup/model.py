"""The model that a run's settings name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from oncelm.models.registry import presets
from oncelm.models.resolve import build
from oncelm.train.config import TrainConfig
from oncelm.train.crossbatch import check_crossbatch
from oncelm.utils.errors import check_choice


def make_model(config: TrainConfig, vocab_size: int, *, weights: bool = True) -> PreTrainedModel:
    """The model that the settings name, on the CPU: a folder's, or a new one of a preset, of YOCO or Llama.

    Args:
        vocab_size: of a new one, where the settings' `model_overrides` name no other.
        weights: False makes it without values, on the meta device, and reads none.
    """
    overrides = dict(config.model_overrides)
    if config.crossbatch_rows is not None:
        overrides["dataset_packing"] = config.crossbatch_rows
    if not Path(config.model).is_dir():
        check_choice("model", config.model, presets())
        overrides = {"vocab_size": vocab_size} | overrides
    return build(config.model, "cpu", weights=weights, seed=config.seed, **overrides)


def check_model(config: TrainConfig) -> None:
    """ValueError unless the model that the settings name fits their crossbatch; only its configuration is read."""
    if config.crossbatch_rows is not None or "mem_layers" in config.model_overrides or Path(config.model).is_dir():
        model = make_model(replace(config, crossbatch_rows=None), vocab_size=1024, weights=False)
        check_crossbatch(config, model.config)
