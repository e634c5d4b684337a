"""The models, registered with transformers' Auto classes when this package is imported."""

from transformers import AutoConfig, AutoModelForCausalLM

from oncelm.models.load import build_model, load
from oncelm.models.longllama import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.models.yoco import YocoConfig, YocoForCausalLM

for config, model in ((YocoConfig, YocoForCausalLM), (LongLlamaConfig, LongLlamaForCausalLM)):
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)

__all__ = ["LongLlamaConfig", "LongLlamaForCausalLM", "YocoConfig", "YocoForCausalLM", "build_model", "load"]
