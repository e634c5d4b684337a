"""Named sizes: the paper's (arXiv 2405.05254, tables 1 and 5; PAPER_SIZES), and small ones for a CPU."""

from __future__ import annotations

from typing import Any

from oncelm.models.yoco.config import YocoConfig, changed
from oncelm.models.yoco.mixers import find_mixer


def _scaling(hidden_size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """A size of the scaling study (section 4.3): FFN 3d, retention heads of 256, tied embeddings, sequences of 2048."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_self_decoder_layers": num_layers // 2,
        "num_cross_decoder_layers": num_layers // 2,
        "num_self_heads": hidden_size // 256,
        "num_attention_heads": num_heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }


def _small(hidden_size: int, num_layers: int, vocab_size: int) -> dict[str, Any]:
    """A size for a CPU: retention heads of 64, cross-decoder heads of 32 with 2 query heads a KV head."""
    return {
        **_scaling(hidden_size, num_layers, hidden_size // 32),
        "num_self_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 64,
        "vocab_size": vocab_size,
        "max_position_embeddings": 1024,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "yoco-tiny": _small(128, 4, 4096),
    "yoco-small": _small(256, 8, 4096),
    "yoco-160m": _scaling(768, 12, 12),
    "yoco-400m": _scaling(1024, 24, 16),
    "yoco-830m": _scaling(1536, 24, 12),
    "yoco-1.4b": _scaling(2048, 24, 16),
    "yoco-2.7b": _scaling(2560, 32, 20),
    "yoco-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_self_decoder_layers": 13,
        "num_cross_decoder_layers": 13,
        "num_self_heads": 24,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    "yoco-6.8b": _scaling(4096, 32, 32),
    "yoco-13b": _scaling(5120, 40, 40),
}


def sized_config(
    hidden_size: int = 512, num_layers: int = 12, self_decoder: str = "gated_retention", **changes: Any
) -> YocoConfig:
    """A shape that a CPU measures in minutes, in the paper's proportions, with any keys changed.

    Half the layers are self-decoder, feed-forward 3 d, retention heads of 256, attention heads of 64, two query heads
    a key/value head. 32,000 is LLaMA's vocabulary: at this width a larger one would weigh more than all layers.
    """
    heads = hidden_size // 64
    shape = {
        "vocab_size": 32000,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_self_decoder_layers": num_layers - num_layers // 2,
        "num_cross_decoder_layers": num_layers // 2,
        "self_decoder": self_decoder,
        "num_self_heads": max(1, hidden_size // find_mixer(self_decoder).usual_head_dim),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
    }
    return YocoConfig(**changed(shape, changes))


def llama_twin(config: YocoConfig) -> dict[str, Any]:
    """Keys of the Llama that a YOCO is compared with, in training as in benchmarks.

    Same width, depth, vocabulary, heads and, in every layer, key/value heads as the shared cache. Its feed-forward is
    8/3 d wide, rounded up to a multiple of 128: the YOCO paper pairs that with 3 d for its own model, which spends less
    on key and value projections. So the Llama has a few percent fewer parameters, never more.
    """
    same = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "tie_word_embeddings"),
    )
    inner = -(-8 * config.hidden_size // (3 * 128)) * 128
    other = {"intermediate_size": inner, "num_key_value_heads": config.shared_kv_heads}
    return {key: getattr(config, key) for key in same} | other


LLAMA_PRESETS = {
    name.replace("yoco", "llama"): {"model_type": "llama", **llama_twin(YocoConfig(**keys))}
    for name, keys in PRESETS.items()
}
