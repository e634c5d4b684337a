"""The models, registered with transformers' Auto classes when this package is imported."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oncelm.models.load import build_model, load
from oncelm.models.longllama import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.models.yoco import YocoConfig, YocoForCausalLM

for config, model in ((YocoConfig, YocoForCausalLM), (LongLlamaConfig, LongLlamaForCausalLM)):
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
    # Trainer asks this table whether labels are of the next token, as label smoothing has to know; it has no register
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__

__all__ = ["LongLlamaConfig", "LongLlamaForCausalLM", "YocoConfig", "YocoForCausalLM", "build_model", "load"]
