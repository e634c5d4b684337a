"""Fixtures of the model tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from oncelm import YocoForCausalLM
from tests.models.small import make_ill_conditioned, make_model


@pytest.fixture(scope="session")
def models() -> Callable[[str], YocoForCausalLM]:
    """The model of a kind, made once."""
    made: dict[str, YocoForCausalLM] = {}

    def get(kind: str) -> YocoForCausalLM:
        if kind not in made:
            made[kind] = make_ill_conditioned() if kind == "ill-conditioned" else make_model(kind)
        return made[kind]

    return get
