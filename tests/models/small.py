"""Small models: of every kind that YOCO has, and a LongLLaMA."""

from __future__ import annotations

from typing import Any

import torch

from oncelm import LongLlamaConfig, LongLlamaForCausalLM, YocoConfig, YocoForCausalLM

VOCAB = 61

KINDS: dict[str, dict[str, Any]] = {
    "retention": {},
    "window": {"self_decoder": "sliding_window", "window_size": 7, "num_self_key_value_heads": 1},
    "unstacked": {"layout": "unstacked"},
    "interleaved": {"layout": "interleaved"},
    "window-interleaved": {"layout": "interleaved", "self_decoder": "sliding_window", "window_size": 5},
    "retention-only": {"num_cross_decoder_layers": 0},
    "cross-only": {"num_self_decoder_layers": 0},
    "llama-like": {
        "rope_pairing": "half",
        "rope_spacing": "standard",
        "scale_embeddings": False,
        "tie_word_embeddings": True,
    },
}


def make_model(kind: str, **changes: Any) -> YocoForCausalLM:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_self_decoder_layers": 2,
        "num_cross_decoder_layers": 2,
        "num_self_heads": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **KINDS[kind],
        **changes,
    }
    torch.manual_seed(0)
    model = YocoForCausalLM(YocoConfig(**settings))
    for parameter in model.parameters():  # larger than the initialisation, so that every part shows in the logits
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def make_long(**changes: Any) -> LongLlamaForCausalLM:
    """A LongLLaMA with windows of 16 tokens and memory in layers 1 and 2 of 3."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "last_context_length": 6,
        "mem_layers": [1, 2],
        "mem_dtype": None,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    model = LongLlamaForCausalLM(LongLlamaConfig(**settings))
    for parameter in model.parameters():  # larger than the initialisation, so that every part shows in the logits
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()
