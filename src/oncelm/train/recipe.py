"""Settings as people write them: a recipe (YAML), and `key=value` that replaces some of it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from oncelm.utils.errors import renamed, unknown
from oncelm.utils.settings import parse_yaml

logger = logging.getLogger(__name__)

# What settings were called: answered with their name of today, but in files, which may be those of a run that goes on
RENAMED = {
    "chunk_parallel": "context_parallel",
    "within_documents": "document_masking",
    "validation_share": "validation_fraction",
    "decay_share": "decay_fraction",
    "packing": "crossbatch_rows",
}


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """What a YAML file of `key: value` lines says; ValueError where it is none."""
    try:
        text = Path(recipe).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(
            f"recipe {str(recipe)!r} (--config) cannot be read: {reason}; give a YAML file of settings, as in recipes/."
        ) from None
    parsed = parse_yaml(text, f"recipe {str(recipe)!r}")
    if not isinstance(parsed, dict):
        raise ValueError(f"recipe {str(recipe)!r} must hold `key: value` lines, got {type(parsed).__name__}.")
    if old := [name for name in parsed if name in RENAMED]:
        told = ", ".join(f"{name} is now called {RENAMED[name]}" for name in old)
        logger.warning("recipe %r: %s", str(recipe), told)
    return with_new_names(parsed)


def with_new_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote, by their names of today."""
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def check_names(settings: Collection[str], known: Collection[str]) -> None:
    """ValueError for a setting that there is not, with the one that may be meant."""
    for name in settings:
        if name in RENAMED:
            raise renamed("setting", name, RENAMED[name])
        if name not in known:
            from oncelm.models.registry import FAMILIES, model_class  # here: help and recipes are read without torch

            if any(name in model_class(model_type).config_class.own_keys() for model_type in FAMILIES):
                raise ValueError(f"{name!r} is a key of the model, no setting: give it as model_overrides.{name}.")
            raise unknown("setting", name, known)


def override(settings: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`settings` with some replaced, each as in "lr=3e-4" or "model_overrides.window_size=256".

    >>> override({"lr": 0.1, "steps": 5}, ["lr=3e-4"])
    {'lr': 0.0003, 'steps': 5}
    """
    merged = dict(settings)
    for one in overrides:
        key, equals, text = one.partition("=")
        if not equals or not key:
            raise ValueError(f"override {one!r} must have the form key=value, as in lr=3e-4.")
        name, dot, inner = key.partition(".")
        value = parse_yaml(text, f"override {one!r}")
        if dot:
            before = merged.get(name) or {}
            if name != "model_overrides" or not isinstance(before, dict):
                raise ValueError(f"override {one!r}: only model_overrides has inner keys.")
            merged[name] = before | {inner: value}
        else:
            merged[name] = value
    return merged
