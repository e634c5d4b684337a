"""The models, registered with transformers' Auto classes when this package is imported."""

from transformers import AutoConfig, AutoModelForCausalLM

from oncelm.models.load import build_model, load
from oncelm.models.yoco import YocoConfig, YocoForCausalLM

AutoConfig.register(YocoConfig.model_type, YocoConfig)
AutoModelForCausalLM.register(YocoConfig, YocoForCausalLM)

__all__ = ["YocoConfig", "YocoForCausalLM", "build_model", "load"]
