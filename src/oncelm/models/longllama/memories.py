"""Which cache each layer of a LongLLaMA gets, from the configuration and the kind of memory asked for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from oncelm.cache.longllama.blocks import MemoryBlocks
from oncelm.cache.longllama.cache import LongLayer
from oncelm.cache.longllama.knn import MemoryIndex
from oncelm.cache.longllama.local_kv import LocalKV
from oncelm.cache.longllama.memory_kv import MemoryKV
from oncelm.cache.longllama.remote import MemoryStore, RemoteMemory
from oncelm.models.longllama.config import MEMORY_DTYPES, LongLlamaConfig
from oncelm.utils.errors import check_choice, check_whole

MEMORIES = ("exact", "knn", "cpu", "disk")


@dataclass(frozen=True)
class MemoryOptions:
    """Where memory is and how it is read: see `LongLlamaForCausalLM.new_cache`."""

    memory: str
    dtype: torch.dtype | None  # None: config.mem_dtype, or the model's
    top_k: int
    index: str
    measure_recall: bool
    block_tokens: int
    folder: Path | None

    def __post_init__(self) -> None:
        check_choice("memory", self.memory, MEMORIES)
        if self.dtype is not None:
            check_choice("dtype of a cache", self.dtype, [getattr(torch, name) for name in MEMORY_DTYPES])
        check_whole(1, block_tokens=self.block_tokens)
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"folder {str(self.folder)!r} for the files of memory 'disk' does not exist.")


def new_layers(
    config: LongLlamaConfig,
    options: MemoryOptions,
    batch_size: int,
    max_tokens: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LongLayer]:
    """A LocalKV of `dtype` for each layer without memory, and for each memory layer what `options` ask for.

    Raises:
        ValueError: memory "knn" with int8, which Faiss does not search.
    """
    heads, head_dim = config.num_key_value_heads, config.head_dim
    mem_dtype = options.dtype or (dtype if config.mem_dtype is None else getattr(torch, config.mem_dtype))
    if options.memory == "knn" and mem_dtype == torch.int8:
        raise ValueError(
            "mem_dtype 'int8' is not for memory 'knn', which keeps floats for its search; take mem_dtype 'bfloat16', "
            "new_cache(dtype=torch.bfloat16), or memory 'exact', 'cpu' or 'disk'."
        )
    grouping = None
    if config.mem_attention_grouping is not None:
        heads_at_once, queries_at_once = config.mem_attention_grouping
        grouping = (heads_at_once, queries_at_once)

    def store() -> MemoryStore:
        if options.memory == "knn":
            recall = options.measure_recall
            return MemoryIndex(batch_size, heads, head_dim, mem_dtype, options.top_k, options.index, recall)
        place: torch.device | Path = device
        if options.memory == "cpu":
            place = torch.device("cpu")
        elif options.memory == "disk":
            place = options.folder or Path(tempfile.gettempdir())
        return MemoryBlocks(batch_size, heads, head_dim, mem_dtype, place, options.block_tokens, grouping)

    def layer(i: int) -> LongLayer:
        if i not in config.mem_layers:
            local = None if max_tokens is None else min(max_tokens, config.max_position_embeddings)
            return LocalKV(batch_size, local, heads, head_dim, dtype, device)
        if options.memory == "exact" and mem_dtype == dtype:
            return MemoryKV(batch_size, max_tokens, heads, head_dim, dtype, device, grouping)
        return RemoteMemory(batch_size, heads, head_dim, dtype, device, store())

    return [layer(i) for i in range(config.num_hidden_layers)]


def cache_bytes(config: LongLlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the caches of one sequence, wherever they are: local ones of `dtype`, and memory."""
    per_token = 2 * config.num_key_value_heads * config.head_dim  # numbers, in one layer
    local = min(tokens, config.max_position_embeddings) * per_token * config.num_hidden_layers * dtype.itemsize
    kept = dtype if config.mem_dtype is None else getattr(torch, config.mem_dtype)
    scales = 2 * config.num_key_value_heads * 4 if kept == torch.int8 else 0
    return local + tokens * len(config.mem_layers) * (per_token * kept.itemsize + scales)
