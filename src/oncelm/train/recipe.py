"""Settings as people write them: a recipe (YAML), and `key=value` that replaces some of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from oncelm.utils.settings import parse_yaml


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
    return parsed


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
