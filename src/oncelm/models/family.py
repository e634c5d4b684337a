"""What a family of models can do beyond any model of transformers. Code asks these attributes, never a model's type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import LlamaConfig, PreTrainedConfig

    from oncelm.models.split import Split
    from oncelm.models.work import WorkCounts

# keys of a Llama's configuration that fix its sizes
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip


class Family:
    """The abilities of a kind of model. As they stand here: those of any model of transformers, which has none of them.

    `models/registry.py` finds the family of a configuration, `CausalLM` is what OnceLM's families inherit.

    Attributes:
        title: its name in words.
        has_own_cache: `new_cache(batch_size, max_tokens, dtype)`, `prefill(ids, cache, progress=)`, `mark`, `rewind`,
            `reuse`; where a text may be read in any parts, `prefill(chunk_size=)` and `prefill_chunk_size(batch_size)`.
        kv_dtypes: names (`utils/device.KV_DTYPES`) of what its cache can store keys and values in, beside the model's
            own dtype.
        cache_options: further arguments of `new_cache`, which `generate` takes too.
        read_options: further arguments of `prefill` and `forward` on which results depend.
        reads_by_windows: a text read in other parts may give other results, since what becomes memory depends on where
            a call ends; windows are `config.max_position_embeddings` long, and texts have no longest length.
        packs_rows: sequences packed into one row (`cu_seqlens`) can be appended to a cache, and logits at a mask of
            positions (`logits_to_keep`) cost no more than these positions.
        runs_in_engine: the engine runs many of its texts at once, in pages and slots (`engine/pool.py`).
        takes_host_inputs: `forward` takes ids, labels and `cu_seqlens` on the CPU too, and then waits for no value of a
            GPU; it knows `logits_to_keep` and `num_items_in_batch`.
        has_crossbatch: rows of a training batch may see each other (`config.cross_batch_range`, `dataset_packing`).
        can_compile: `compile_layers(enabled)`.
        quantizations: names that `set_quantization` takes.
        official_format: the module that reads and writes the format of the paper's own code, with the functions and
            constants of `yoco/official.py`.
        presets: shapes without weights by name: the keys of a configuration, of the family's own or of the
            `model_type` that stands among them.
        result_keys: keys of the configuration on which results depend, beside the weights and their sizes.
        splits: settings of training on several ranks that it can follow: "tensor_parallel" (`tensor_plan`),
            "context_parallel" (`context_past`).
        has_fused_loss: its loss keeps no logits for the backward pass.
        adopts: model types of transformers whose folders it reads too, each with the key that has to be given for that.
    """

    title = ""
    has_own_cache = False
    kv_dtypes: tuple[str, ...] = ()
    cache_options: tuple[str, ...] = ()
    read_options: tuple[str, ...] = ()
    reads_by_windows = False
    packs_rows = False
    runs_in_engine = False
    takes_host_inputs = False
    has_crossbatch = False
    can_compile = False
    quantizations: tuple[str, ...] = ()
    official_format = ""
    presets: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    result_keys: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    has_fused_loss = False
    adopts: Mapping[str | None, str] = MappingProxyType({})

    @classmethod
    def layers_in_words(cls, config: PreTrainedConfig) -> list[tuple[str, str]]:
        """Rows of `oncelm info`; here as far as the configuration uses the usual names.

        >>> from transformers import LlamaConfig
        >>> Family.layers_in_words(LlamaConfig())[0]
        ('layers', '32 of 32 heads, 32 key/value heads')
        """
        kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        heads = f" of {config.num_attention_heads} heads, {kv_heads} key/value heads" if kv_heads else ""
        inner = getattr(config, "intermediate_size", None)
        width = f"{config.hidden_size:,}" + (f", feed-forward {inner:,}" if inner else "")
        return [("layers", f"{config.num_hidden_layers}{heads}"), ("width", width)]

    @classmethod
    def work(
        cls, config: PreTrainedConfig, element_size: int, kv_element_size: float | None = None
    ) -> WorkCounts | None:
        """What a model of that configuration costs; here of a Llama, None for others, which nobody has counted.

        element_size, kv_element_size: bytes of a number of its weights, and of its keys and values of all tokens, a
        share of their scale included; None: the same.
        """
        from transformers import LlamaConfig

        from oncelm.models.work import LlamaWork

        return LlamaWork(config, element_size) if isinstance(config, LlamaConfig) else None

    @classmethod
    def peer_config(cls, config: PreTrainedConfig) -> LlamaConfig:
        """The Llama that a model of that configuration is compared with; here of the same sizes, by their usual names.

        A LongLLaMA's is itself without memory, which keeps all keys of all layers.
        """
        from transformers import LlamaConfig

        return LlamaConfig(**{key: getattr(config, key) for key in SIZES if hasattr(config, key)})

    @classmethod
    def local_options(cls, config: PreTrainedConfig, tokens: int, room: int = 0) -> dict[str, Any]:
        """Some of `read_options`: with them a short text meets whatever a long one does, since no more than its last
        `tokens` tokens are local, so few that `room` more stay local too. Here there is nothing of the kind."""
        return {}

    @classmethod
    def kept_numbers(cls, config: PreTrainedConfig) -> tuple[list[int], int] | None:
        """Numbers a token that a forward pass keeps for the backward pass: of what mixes tokens in each layer (queries,
        keys and values as made and as rotated, gate, output), and outside of the layers. None: not known.

        Here of a Llama.
        """
        from transformers import LlamaConfig

        if not isinstance(config, LlamaConfig):
            return None
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        return [3 * config.hidden_size + 3 * config.num_key_value_heads * head_dim] * config.num_hidden_layers, 0

    @classmethod
    def tensor_plan(cls, config: PreTrainedConfig, ranks: int) -> dict[str, Split]:
        """How each module, by name or pattern, is split over ranks; ValueError where it cannot be."""
        raise NotImplementedError

    @classmethod
    def context_past(cls, config: PreTrainedConfig) -> Callable[[ProcessGroup, tuple[int, ...]], Any]:
        """What makes `forward(past=...)` for a chunk of each sequence, whose other chunks the other ranks of a group
        hold, so many tokens behind the beginning of each; ValueError where it cannot be."""
        raise NotImplementedError
