"""LongLLaMA as Hugging Face models: input of any length, memories, hidden states, logits, prefill."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from oncelm.cache.longllama.cache import LongLlamaCache, Piece, plan
from oncelm.cache.longllama.fresh import CrossbatchMemory, FreshLocal, FreshMemory
from oncelm.cache.longllama.segment import LayerMemory, Segment
from oncelm.models.base import BaseModel, Pass, check_cache_size
from oncelm.models.causal_lm import CausalLM
from oncelm.models.checks import check_tokens, fingerprint
from oncelm.models.classifiers import SequenceClassifier, TokenClassifier
from oncelm.models.compiling import CompilesLayers
from oncelm.models.extras import with_arguments_of
from oncelm.models.inputs import Inputs, read_inputs
from oncelm.models.longllama.arguments import check_arguments, check_last_context
from oncelm.models.longllama.config import LongLlamaConfig
from oncelm.models.longllama.memories import MemoryOptions, cache_bytes, new_layers
from oncelm.models.longllama.model import PLAIN, Backbone, Parts, compiled_parts
from oncelm.models.longllama.work import LongLlamaWork
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.wanted import Wanted

# Keys on which a memory's content depends, beside the weights; the others say how it is kept and read.
_KEYS_OF_MEMORY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "mem_layers",
    "mem_positionals",
)  # fmt: skip


class LongLlamaModel(CompilesLayers, BaseModel):
    """A LLaMA whose memory layers also attend to all earlier text (arXiv 2307.03170), without a head. Weights carry
    the names that they have in LLaMA's causal language models.

    Input is cut into windows. Without a cache, with gradients, memory is differentiable: later windows' losses reach
    earlier windows' keys and values. With crossbatch, each row is one context of at most a window, and there are no
    windows. `from_pretrained` reads the folder of any LLaMA-family model; `mem_layers=[...]` says which layers get
    memory.
    """

    config_class = LongLlamaConfig
    config: LongLlamaConfig
    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 (a buffer of older checkpoints)
    cache_keys = ("num_hidden_layers", "num_key_value_heads", "head_dim", "mem_layers", "max_position_embeddings")
    title = "LongLLaMA"
    has_crossbatch = True
    kv_dtypes = ("bfloat16", "int8")
    cache_options = ("memory",)
    read_options = ("last_context_length",)
    reads_by_windows = True
    result_keys = ("last_context_length", "mem_dtype")
    family_heads = ("lm_head", "score")
    adopts = {"llama": "mem_layers"}  # noqa: RUF012
    own_arguments = (
        "last_context_length", "memory", "cross_batch_range", "cross_batch_stepping", "dataset_packing",
    )  # fmt: skip

    def __init__(self, config: LongLlamaConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config)
        self.add_head(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """LLaMA's initialisation."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    # -- caches ---------------------------------------------------------------------------------------------------

    def new_cache(
        self,
        batch_size: int = 1,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory: str = "exact",
        top_k: int = 128,
        index: str = "flat",
        measure_recall: bool = False,
        block_tokens: int = 8192,
        folder: str | os.PathLike[str] | None = None,
    ) -> LongLlamaCache:
        """A cache on the model's device, its memory wherever `memory` says.

        Args:
            batch_size: sequences.
            max_tokens: capacity of each sequence; memory on the device is then allocated once. None: as many as come.
            dtype: of the memory, torch.int8 with a scale a token and head; None means config.mem_dtype. Local caches
                have the model's.
            memory: "exact" (on the device), "cpu" (in pinned CPU memory) or "disk" (in files), both streamed in blocks
                and exactly equal to "exact"; "knn" (in CPU memory; a query sees the top_k keys that Faiss finds).
            top_k, index: of "knn": keys a query head sees; "flat", "ivf" or "hnsw".
            measure_recall: of "knn": search exactly too, for `cache.recall()`.
            block_tokens: tokens in a block of "cpu" and "disk".
            folder: of "disk": where its files go (they vanish with the cache); None means the temporary folder.
        """
        check_cache_size(batch_size, max_tokens)
        where = None if folder is None else Path(folder)
        options = MemoryOptions(memory, dtype, top_k, index, measure_recall, block_tokens, where)
        layers = new_layers(self.config, options, batch_size, max_tokens, self.dtype, self.cache_device)
        window = self.config.max_position_embeddings
        return LongLlamaCache(layers, batch_size, max_tokens, window, self._cache_settings())

    def longest_whole(self, last_context_length: int | None = None) -> int:  # type: ignore[override]
        """A longer text moves to memory, up to a place that depends on where a call ends."""
        return check_last_context(self.config, last_context_length)

    @property
    def kv_dtype(self) -> torch.dtype:
        return self.dtype if self.config.mem_dtype is None else getattr(torch, self.config.mem_dtype)

    def fingerprint(self) -> str:
        """A short hash of the configuration and of a sample of every parameter: whose cache a file is."""
        return fingerprint(self, _KEYS_OF_MEMORY)

    def cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        return cache_bytes(self.config, tokens, dtype)

    @classmethod
    def work(cls, config: PreTrainedConfig, element_size: int, kv_element_size: float | None = None) -> LongLlamaWork:
        return LongLlamaWork(config, element_size, kv_element_size)

    @classmethod
    def local_options(cls, config: LongLlamaConfig, tokens: int, room: int = 0) -> dict[str, int]:
        return {"last_context_length": min(tokens, config.max_position_embeddings - room)}

    @classmethod
    def layers_in_words(cls, config: LongLlamaConfig) -> list[tuple[str, str]]:
        layers, *rest = super().layers_in_words(config)
        memory = f"layers {', '.join(map(str, config.mem_layers))}" if config.mem_layers else "no layers"
        return [layers, ("memory", f"{memory}, kept in {config.mem_dtype or 'the dtype of the model'}"), *rest]

    # -- hidden states --------------------------------------------------------------------------------------------

    def _states(self, given: Pass, wanted: Wanted) -> Iterator[tuple[slice, torch.Tensor]]:
        for columns, hidden in self._sequences(given.tokens, given.inputs, given.cache, **given.options):
            yield columns, wanted.within(columns, hidden)

    def _sequences(
        self, tokens: torch.Tensor, inputs: Inputs, cache: LongLlamaCache | None, **options: Any
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`_windows` of the rows, or of each of the packed sequences in one row."""
        if inputs.batch.cu_seqlens is None or inputs.real is not None:  # the latter are rows with padding
            yield from self._windows(tokens, inputs.real, cache, **options)
            return
        for first, last in pairwise(accumulate(inputs.batch.lengths, initial=0)):
            if first == last:
                continue
            for columns, hidden in self._windows(tokens[:, first:last], None, None, **options):
                yield slice(first + columns.start, first + columns.stop), hidden

    def _windows(
        self,
        tokens: torch.Tensor,
        real: torch.Tensor | None,
        cache: LongLlamaCache | None,
        last_context_length: int,
        counts: tuple[int, ...] | None = None,
        memory: str = "exact",
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, hidden states [B, t, d], zeros at padding) of one window after the other.

        Args:
            tokens: [B, T] ids or [B, T, d] embeddings.
            real: [B, T] booleans, False at padding; None: no padding.
            last_context_length: columns at the end that stay out of memory.
            counts: of crossbatch, the rows before it that each row sees.
            memory: kind of the memory of a pass without gradients and without a cache.
        """
        B, T = tokens.shape[:2]
        held, window = 0 if cache is None else cache.local_columns, self.config.max_position_embeddings
        pieces = list(plan(T, held, window, last_context_length, cache is not None))
        layers: Sequence[LayerMemory]
        differentiable = cache is None and torch.is_grad_enabled()
        if counts is not None:
            pieces = [Piece(slice(0, T), False, "dropped")]
        if counts is not None or differentiable:
            layers = self._fresh_layers(counts)
        else:
            if cache is None:
                cache = self.new_cache(B, memory=memory)
            lengths = (T,) * B if real is None else tuple(real.sum(1).tolist())
            cache.check_room(lengths)
            cache.begin()
            if len(pieces) > 1:
                cache.reserve(lengths)
            layers = cache.layers
        none = (0,) * B
        for index, piece in enumerate(pieces):
            if piece.spill_first:
                assert cache is not None
                cache.spill()
            part, there = tokens[:, piece.columns], None if real is None else real[:, piece.columns]
            if there is not None and not differentiable and bool(there.all()):
                there = None
            local, remembered = (none, none) if cache is None else (cache.local, cache.remembered)
            inputs = Inputs.of_rows(local, there, part.shape[1], part.device)
            segment = Segment(inputs.batch, remembered, piece.fate, index)
            hidden = self.model(inputs.gather(part), layers, segment, self._parts)
            if cache is not None:
                cache.advance(inputs.batch, inputs.columns, piece.fate)
                if index == len(pieces) - 1:
                    cache.commit()
            yield piece.columns, inputs.spread(hidden)

    def _parts(self, x: torch.Tensor) -> Parts:
        return compiled_parts(torch.is_grad_enabled()) if self.compiles(x) else PLAIN

    def _fresh_layers(self, counts: tuple[int, ...] | None) -> list[LayerMemory]:
        """Layer caches of a pass with gradients; crossbatch in the memory layers if there are counts."""
        return [
            FreshLocal()
            if i not in self.config.mem_layers
            else FreshMemory()
            if counts is None
            else CrossbatchMemory(counts)
            for i in range(self.config.num_hidden_layers)
        ]

    def _stack(self) -> list[nn.Module]:
        return [*self.model.layers, self.model.norm]

    # -- arguments ------------------------------------------------------------------------------------------------

    def _makes_cache(self, own: dict[str, Any], is_packed: bool) -> bool:
        return not is_packed and not own.get("cross_batch_range")

    def _check_own(self, own: dict[str, Any], *given: Any) -> dict[str, Any]:
        return check_arguments(self.config, self.training, own, *given)


class LongLlamaForSequenceClassification(SequenceClassifier, LongLlamaModel):
    """A LongLLaMA that sorts texts into classes."""


class LongLlamaForTokenClassification(TokenClassifier, LongLlamaModel):
    """A LongLLaMA that sorts tokens into classes."""


class LongLlamaForCausalLM(CausalLM, LongLlamaModel):
    """A LongLLaMA that predicts the next token: logits, loss, prefill, generate."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    head_names = ("lm_head",)
    others = (LongLlamaModel, LongLlamaForSequenceClassification, LongLlamaForTokenClassification)

    def add_head(self, config: PreTrainedConfig) -> None:
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @with_arguments_of(CausalLM.forward)
    def forward(
        self,
        *args: Any,
        last_context_length: int | None = None,
        memory: str | None = None,
        cross_batch_range: int | None = None,
        cross_batch_stepping: bool | None = None,
        dataset_packing: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """As `CausalLM.forward`, of input of any length, cut into windows by columns, padding included. Packed
        sequences are computed one after the other, without a cache.

        Args:
            last_context_length: columns at the end that are not loaded into memory; None means the config's.
            memory: kind of the cache that this call makes (see `new_cache`); None means "exact". Refused beside a
                cache, and with gradients or crossbatch, where there is none.
            cross_batch_range, cross_batch_stepping, dataset_packing: crossbatch over the rows of this batch
                (see `oncelm.ops.crossbatch.earlier_contexts`); None means the config's in training mode, else none.
        """
        return super().forward(
            *args,
            last_context_length=last_context_length,
            memory=memory,
            cross_batch_range=cross_batch_range,
            cross_batch_stepping=cross_batch_stepping,
            dataset_packing=dataset_packing,
            **kwargs,
        )

    # -- reading long input ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor,
        cache: LongLlamaCache,
        last_context_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> torch.Tensor:
        """Read any number of tokens into `cache`, window by window; may be called again to append.

        Args:
            input_ids: [B, T].
            cache: from `new_cache`.
            last_context_length: as in `forward`.
            attention_mask: [B, T], 0 at padding.
            progress: called after each window with the number of columns read so far.

        Returns:
            Logits [B, V] of each sequence's last token.
        """
        input_ids = check_tokens(input_ids, None, self.config)
        self._check_cache(cache)
        shape, device = input_ids.shape, input_ids.device
        inputs = read_inputs(shape, device, attention_mask, None, cache.lengths, cache.columns)
        if inputs.real is not None and bool((inputs.real.sum(1) == 0).any()):
            raise ValueError("attention_mask has a row without tokens; prefill needs at least one in each.")
        last = inputs.last_columns()
        hidden = torch.empty(shape[0], self.config.hidden_size, dtype=self.dtype, device=device)
        kept = check_last_context(self.config, last_context_length)
        for columns, part in self._windows(input_ids, inputs.real, cache, kept):
            if inputs.real is not None:
                ending = (last >= columns.start) & (last < columns.stop)
                hidden[ending] = part[ending, last[ending] - columns.start]
            elif columns.stop == shape[1]:
                hidden = part[:, -1]
            if progress is not None:
                progress(columns.stop)
        return self.lm_head(hidden)
