"""How a YOCO is trained on several ranks: split by heads and hidden units, or by chunks of each sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from oncelm.cache.yoco.interface import Pasts
from oncelm.cache.yoco.shared_kv import ChunkShared
from oncelm.models.split import (
    COLUMNS,
    EMBEDDING,
    LOGITS,
    ROWS,
    WHOLE,
    WHOLE_AT_THE_END,
    Heads,
    Split,
    check_divides,
    check_heads,
)
from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.mixers import mixers_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tensor_plan(config: YocoConfig, ranks: int) -> dict[str, Split]:
    """How each module is split, by name or pattern.

    Raises:
        ValueError: heads, hidden units or vocabulary do not divide among the ranks, or a mixer has no plan.
    """
    mixers = [mixer.tensor_plan(config, ranks) for mixer in mixers_of(config)]
    check_divides(config, ranks, "num_self_heads", "num_attention_heads", "intermediate_size", "vocab_size")
    check_heads("num_self_key_value_heads", config.self_kv_heads, ranks)
    check_heads("num_key_value_heads", config.shared_kv_heads, ranks)
    plan: dict[str, Split] = {
        "embed_tokens": EMBEDDING,
        "layer_norm": WHOLE_AT_THE_END,
        "output_projection": LOGITS,
        "cross_decoder.layers.*.mixer.q_proj": ROWS,
        "cross_decoder.layers.*.mixer.out_proj": COLUMNS,
        "cross_decoder.kv_layer_norm": WHOLE,
    }
    plan |= dict.fromkeys(
        ("cross_decoder.k_proj", "cross_decoder.v_proj"), Heads(config.shared_kv_heads, config.head_dim)
    )
    for number, own in enumerate(mixers):
        plan |= {f"self_decoder.layers.{number}.mixer.{name}": split for name, split in own.items()}
    for layer in ("self_decoder.layers.*", "cross_decoder.layers.*"):
        plan |= {f"{layer}.ffn.fc1": ROWS, f"{layer}.ffn.gate": ROWS, f"{layer}.ffn.fc2": COLUMNS}
        plan |= {f"{layer}.mixer_layer_norm": WHOLE, f"{layer}.final_layer_norm": WHOLE}
    return plan


def context_past(config: YocoConfig) -> Callable[[ProcessGroup, tuple[int, ...]], Pasts]:
    """What makes the past of one forward pass over this rank's chunk of each sequence, of the ranks that share them, in
    the order of their chunks, and the number of tokens before this chunk, of each sequence.

    Raises:
        ValueError: a mixer that does not know how.
    """
    layers = [mixer.chunk_past(config) for mixer in mixers_of(config)]
    return lambda group, lengths: Pasts([layer(group) for layer in layers], ChunkShared(group), lengths)
