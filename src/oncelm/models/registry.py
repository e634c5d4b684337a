"""OnceLM's families of models by the `model_type` of their configuration. A new family is one line here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from oncelm.models.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from oncelm.models.causal_lm import CausalLM

# model_type -> where its model class is; imported when it is asked for
FAMILIES = {
    "oncelm_yoco": "oncelm.models.yoco.modeling:YocoForCausalLM",
    "longllama": "oncelm.models.longllama.modeling:LongLlamaForCausalLM",
}


def family(config: PreTrainedConfig) -> type[Family]:
    """What models of a configuration can do: its family, or `Family` itself for other models of transformers.

    >>> from oncelm.models import LongLlamaConfig
    >>> family(LongLlamaConfig()).read_options
    ('last_context_length',)
    """
    model_type = type(config).model_type  # an instance made of another's keys may have that one's
    return model_class(model_type) if model_type in FAMILIES else Family


def families() -> list[type[CausalLM]]:
    """All of FAMILIES, by the classes of their causal language models."""
    return [model_class(model_type) for model_type in FAMILIES]


def titles(can: Callable[[type[CausalLM]], object]) -> str:
    """The families that can do something, in words for an error.

    >>> titles(lambda one: one.can_compile)
    'YOCO and LongLLaMA'
    """
    return " and ".join(one.title for one in families() if can(one))


def adoption(model_type: str | None) -> str:
    """What makes a model of transformers one of a family's, as a sentence for an error; "" where nothing does."""
    adopters = [one for one in families() if model_type in one.adopts]
    return "".join(f" With {one.adopts[model_type]} it is read as a {one.title}." for one in adopters)


def presets() -> dict[str, dict[str, Any]]:
    """Every family's presets by name: keys of a configuration, `model_type` among them."""
    return {
        name: {"model_type": one.config_class.model_type, **keys}
        for one in families()
        for name, keys in one.presets.items()
    }


def official_formats() -> list[Any]:
    """The modules of all official formats (`Family.official_format`)."""
    return [resolve_name(one.official_format) for one in families() if one.official_format]


def official_format(folder: str | os.PathLike[str]) -> Any | None:
    """The one that a folder is in; None: it is in none."""
    return next((one for one in official_formats() if one.is_official_folder(folder)), None)


def model_class(model_type: str) -> type[CausalLM]:
    """The model class of one of FAMILIES."""
    return resolve_name(FAMILIES[model_type])
