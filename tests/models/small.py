"""Small models: of every kind that YOCO has, and a LongLLaMA."""

from __future__ import annotations

from typing import Any

import torch

from oncelm import LongLlamaConfig, LongLlamaForCausalLM, YocoConfig, YocoForCausalLM

VOCAB = 61

KINDS: dict[str, dict[str, Any]] = {
    "retention": {},
    "window": {"self_decoder": "sliding_window", "window_size": 7, "num_self_key_value_heads": 1},
    "delta": {"self_decoder": "gated_delta"},
    "full": {"self_decoder": "full_attention", "num_self_key_value_heads": 1},
    "hybrid": {
        "layer_types": ["gated_retention", "sliding_window", "full_attention", "cross_attention"],
        "window_size": 5,
    },
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
    halves = {} if "layer_types" in KINDS[kind] else {"num_self_decoder_layers": 2, "num_cross_decoder_layers": 2}
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        **halves,
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


def make_ill_conditioned() -> YocoForCausalLM:
    """A model of gated retention in whose first layer q . k of one token is 0 but for rounding.

    What the first token of a sequence reads there is then near 0, and the norm of the head makes rounding large: in
    float32 any way of computing it is off by as much, up to 5e-4 in the logits.
    """
    model = make_model("retention")
    mixer = model.self_decoder.layers[0].mixer
    heads = model.config.num_self_heads
    turn = torch.randn(heads, mixer.head_dim, mixer.head_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # k = A q, and q . A q = 0 where A^T = -A
        turned = 100 * (turn - turn.mT) @ mixer.q_proj.weight.unflatten(0, (heads, -1))
        mixer.k_proj.weight.copy_(turned.flatten(0, 1))
    return model


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
