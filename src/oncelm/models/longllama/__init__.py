"""LongLLaMA: a LLaMA whose memory layers attend to all earlier text, however long."""

from oncelm.models.longllama.config import LongLlamaConfig
from oncelm.models.longllama.modeling import (
    LongLlamaForCausalLM,
    LongLlamaForSequenceClassification,
    LongLlamaForTokenClassification,
    LongLlamaModel,
)

__all__ = [
    "LongLlamaConfig",
    "LongLlamaForCausalLM",
    "LongLlamaForSequenceClassification",
    "LongLlamaForTokenClassification",
    "LongLlamaModel",
]
