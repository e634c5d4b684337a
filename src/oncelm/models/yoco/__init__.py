"""YOCO: a self-decoder that writes one global key/value cache and a cross-decoder that reads it."""

from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.modeling import (
    YocoForCausalLM,
    YocoForSequenceClassification,
    YocoForTokenClassification,
    YocoModel,
)

__all__ = [
    "YocoConfig",
    "YocoForCausalLM",
    "YocoForSequenceClassification",
    "YocoForTokenClassification",
    "YocoModel",
]
