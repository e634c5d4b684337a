"""OnceLM: language models that cache keys and values once."""

from oncelm import ops
from oncelm.data.tokenizers import load_tokenizer
from oncelm.models import YocoConfig, YocoForCausalLM, build_model, load

__all__ = ["YocoConfig", "YocoForCausalLM", "build_model", "load", "load_tokenizer", "ops"]
