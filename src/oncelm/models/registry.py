"""OnceLM's families of models by the `model_type` of their configuration. A new family is one line here."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

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


def model_class(model_type: str) -> type[CausalLM]:
    """The model class of one of FAMILIES."""
    return resolve_name(FAMILIES[model_type])
