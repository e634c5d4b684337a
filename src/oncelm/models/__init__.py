"""The models, registered with transformers' Auto classes when this package is imported."""

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oncelm.models.load import load
from oncelm.models.longllama import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.models.registry import FAMILIES, model_class
from oncelm.models.resolve import build, build_model, describe
from oncelm.models.yoco import YocoConfig, YocoForCausalLM

for model_type in FAMILIES:
    model = model_class(model_type)
    AutoConfig.register(model_type, model.config_class)
    for kind in (model, *model.others):
        kind.auto_model.register(model.config_class, kind)
    # Trainer asks this table whether labels are of the next token, as label smoothing has to know; it has no register
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = model.__name__

__all__ = [
    "LongLlamaConfig",
    "LongLlamaForCausalLM",
    "YocoConfig",
    "YocoForCausalLM",
    "build",
    "build_model",
    "describe",
    "load",
]
