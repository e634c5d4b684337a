"""LongLLaMA as a Hugging Face causal language model: input of any length, loss, memories, generate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from oncelm.cache import Batch
from oncelm.cache.longllama.cache import LongLlamaCache, Piece, plan
from oncelm.cache.longllama.fresh import CrossbatchMemory, FreshLocal, FreshMemory
from oncelm.cache.longllama.segment import Segment
from oncelm.models import inputs as reading
from oncelm.models.causal_lm import CausalLM, check_cache_size
from oncelm.models.checks import check_tokens, fingerprint
from oncelm.models.compiling import CompilesLayers
from oncelm.models.extras import one_of, read_extras
from oncelm.models.head import head_loss
from oncelm.models.longllama.config import LongLlamaConfig
from oncelm.models.longllama.memories import MEMORIES, MemoryOptions, new_layers
from oncelm.models.longllama.model import PLAIN, LongLlamaModel, Parts, compiled_parts
from oncelm.models.rms_norm import RMSNorm
from oncelm.ops.crossbatch import earlier_contexts
from oncelm.utils.errors import check_choice, check_whole

# Keys on which a memory's content depends, beside the weights; the others say how it is kept and read.
_KEYS_OF_MEMORY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "mem_layers",
    "mem_positionals",
)  # fmt: skip


class LongLlamaForCausalLM(CompilesLayers, CausalLM):
    """A LLaMA whose memory layers also attend to all earlier text (arXiv 2307.03170). Weights carry LLaMA's names.

    `from_pretrained` reads the folder of any LLaMA-family model; `mem_layers=[...]` says which layers get memory.
    """

    config_class = LongLlamaConfig
    config: LongLlamaConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 (a buffer of older checkpoints)
    cache_keys = ("num_hidden_layers", "num_key_value_heads", "head_dim", "mem_layers", "max_position_embeddings")
    kv_dtypes = ("bfloat16", "int8")
    cache_options = ("memory",)
    read_options = ("last_context_length",)
    reads_by_windows = True
    result_keys = ("last_context_length", "mem_dtype")

    def __init__(self, config: LongLlamaConfig) -> None:
        super().__init__(config)
        self.model = LongLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """LLaMA's initialisation."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

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

    def fingerprint(self) -> str:
        """A short hash of the configuration and of a sample of every parameter: whose cache a file is."""
        return fingerprint(self, _KEYS_OF_MEMORY)

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: LongLlamaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        last_context_length: int | None = None,
        memory: str | None = None,
        cross_batch_range: int | None = None,
        cross_batch_stepping: bool | None = None,
        dataset_packing: int | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        targets: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, loss, or both, of input of any length, cut into windows.

        Without a cache, with gradients, memory is differentiable: later windows' losses reach earlier windows' keys and
        values. With crossbatch, each row is one context of at most a window, and there are no windows.

        Args:
            input_ids: [B, T] token ids. Without padding, they, labels and cu_seqlens may be on the CPU while
                the model is on a GPU: they are checked there, and nothing waits for the GPU.
            attention_mask: [B, T], or [B, earlier + T] with a cache; 0 marks padding, which is left out of all
                computation. Windows are cut by columns, padding included.
            position_ids: [B or 1, T]; in one row of packed sequences each begins at 0. Otherwise they must be the
                tokens' places, which the model knows by itself.
            past_key_values: a cache from `new_cache` or an earlier call; the tokens are appended to it.
            inputs_embeds: [B, T, d] instead of input_ids.
            labels: [B, T] targets as in Hugging Face: not shifted, -100 ignored. The loss is the mean over targets.
            use_cache: return a cache; None means config.use_cache in evaluation without labels. A pass with a cache
                computes no gradients.
            logits_to_keep: which logits to return: None or 0 all (with labels in training mode, None means none), n the
                last n columns, a vector the columns at these indices (an empty one: none), or a [B, T] mask of booleans
                (logits [number of True, V]).
            last_context_length: columns at the end that are not loaded into memory; None means the config's.
            memory: kind of the cache that this call makes (see `new_cache`); None means "exact". Refused beside a
                cache, and with gradients or crossbatch, where there is none.
            cross_batch_range, cross_batch_stepping, dataset_packing: crossbatch over the rows of this batch
                (see `oncelm.ops.crossbatch.earlier_contexts`); None means the config's in training mode, else none.
            num_items_in_batch: divide the summed loss by this instead of the number of targets (gradient accumulation).
            output_attentions, output_hidden_states: not offered; True is refused.
            return_dict: False returns a tuple.
            targets: [B, T] labels that stand where they are predicted, for rows whose next token is elsewhere.
            cu_seqlens: [N + 1] borders of N sequences packed into one row of input_ids, computed one after the other;
                without a cache.
            kwargs: what Hugging Face tools pass along: `cu_seq_lens_q` is cu_seqlens, `shift_labels` is targets; names
                that are no model's are refused.

        Returns:
            CausalLMOutputWithPast with `loss`, `logits` [B, P, V] (zeros at padding) and `past_key_values`.

        Raises:
            ValueError: inputs that do not fit the model, the cache or each other; nothing has been changed then.
        """
        outputs = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        cu_seqlens, targets = read_extras(self, kwargs, cu_seqlens, targets, **outputs)
        has_loss = one_of(labels=labels, targets=targets) is not None
        tokens = check_tokens(input_ids, inputs_embeds, self.config, self.cache_device)
        counts = self._crossbatch(
            tokens, past_key_values, attention_mask, cross_batch_range, cross_batch_stepping, dataset_packing
        )
        if use_cache is None and (has_loss or counts is not None):
            use_cache = False
        cache, inputs = self._read(
            tokens, attention_mask, position_ids, past_key_values, use_cache, cu_seqlens, memory, counts
        )
        if has_loss:
            targets = reading.read_targets(labels, targets, inputs, tokens.shape, self.config.vocab_size)
            if targets.device.type != "cpu":
                reading.check_range(targets, self.config.vocab_size)
        nothing = has_loss and reading.is_nothing(logits_to_keep, self.training)
        wanted = _Wanted(reading.NOTHING if nothing else logits_to_keep, inputs, tokens)
        # a cache holds values, not graphs: with gradients on, the earlier tokens' share would be missing silently
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            total = torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32), device=tokens.device)
            for columns, hidden in self._sequences(tokens, inputs, cache, last_context_length, counts, memory):
                if targets is not None:
                    total = total + self._window_loss(hidden, targets[:, columns])
                wanted.take(columns, hidden)
            loss = None
            if targets is not None:
                count = (targets != reading.IGNORE_INDEX).sum().clamp_min(1)
                loss = total / (count if num_items_in_batch is None else num_items_in_batch)
            kept = wanted.hidden()
            logits = None if kept is None else self.lm_head(kept)
        return self._output(CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache), return_dict)

    def _window_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy of a window's targets [B, t] from its hidden states [B, t, d]."""
        targets = targets.flatten()
        counted = (targets != reading.IGNORE_INDEX).nonzero().squeeze(1)
        targets, hidden = targets[counted], hidden.flatten(0, 1)[counted.to(hidden.device, non_blocking=True)]
        return head_loss(self.lm_head, hidden, targets.to(hidden.device, non_blocking=True))

    def hidden_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: LongLlamaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        last_context_length: int | None = None,
        memory: str | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Final hidden states [B, T, d] of all positions, zeros at padding; arguments as in `forward`, but that a pass
        with gradients makes no cache unless told to."""
        outputs = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        cu_seqlens, _ = read_extras(self, kwargs, cu_seqlens, None, **outputs)
        tokens = check_tokens(input_ids, inputs_embeds, self.config)
        counts = self._crossbatch(tokens, past_key_values, attention_mask, None, None, None)
        if use_cache is None and (counts is not None or torch.is_grad_enabled()):
            use_cache = False
        cache, inputs = self._read(
            tokens, attention_mask, position_ids, past_key_values, use_cache, cu_seqlens, memory, counts
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            windows = self._sequences(tokens, inputs, cache, last_context_length, counts, memory)
            hidden = torch.cat([hidden for _, hidden in windows], 1)
        return self._output(BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache), return_dict)

    def _read(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: LongLlamaCache | None,
        use_cache: bool | None,
        cu_seqlens: torch.Tensor | None,
        memory: str | None,
        counts: tuple[int, ...] | None,
    ) -> tuple[LongLlamaCache | None, reading.Inputs]:
        """The cache of a forward pass (the given one, a new one, none), and what it is to read."""
        position_ids, attention_mask, cu_seqlens = reading.find_packing(
            tokens.shape, tokens.device, position_ids, attention_mask, cu_seqlens, cache is None
        )
        if counts is not None and (use_cache or cu_seqlens is not None):
            raise ValueError("crossbatch is a way of training: it goes without use_cache and packed sequences.")
        if cu_seqlens is not None and (cache is not None or use_cache):
            raise ValueError(
                "packed sequences (cu_seqlens, position_ids that begin anew) are read without past_key_values and "
                "use_cache; a LongLLaMA's cache takes rows."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if cache is not None:
            self._check_cache(cache)
        if memory is not None:
            check_choice("memory", memory, MEMORIES)
            trains = counts is not None or (torch.is_grad_enabled() and not use_cache)
            if cache is not None or trains:
                where = "past_key_values has one already" if cache is not None else "a pass with gradients has none"
                raise ValueError(f"memory={memory!r} is the kind of the cache that a call makes; {where}.")
        if cache is None and use_cache and counts is None:
            cache = self.new_cache(tokens.shape[0], memory=memory or "exact")
        starts, columns = (None, 0) if cache is None else (cache.lengths, cache.columns)
        inputs = reading.read_inputs(
            tokens.shape, tokens.device, attention_mask, cu_seqlens, starts, columns, position_ids
        )
        return cache, inputs

    def _sequences(
        self,
        tokens: torch.Tensor,
        inputs: reading.Inputs,
        cache: LongLlamaCache | None,
        last_context_length: int | None,
        counts: tuple[int, ...] | None,
        memory: str | None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`_windows` of the rows, or of each of the packed sequences in one row."""
        if inputs.batch.cu_seqlens is None or inputs.real is not None:  # the latter are rows with padding
            yield from self._windows(tokens, inputs.real, cache, last_context_length, counts, memory)
            return
        for first, last in pairwise(accumulate(inputs.batch.lengths, initial=0)):
            if first == last:
                continue
            for columns, hidden in self._windows(tokens[:, first:last], None, None, last_context_length, None, memory):
                yield slice(first + columns.start, first + columns.stop), hidden

    def _windows(
        self,
        tokens: torch.Tensor,
        real: torch.Tensor | None,
        cache: LongLlamaCache | None,
        last_context_length: int | None,
        counts: tuple[int, ...] | None,
        memory: str | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, hidden states [B, t, d], zeros at padding) of one window after the other."""
        B, T = tokens.shape[:2]
        keep = cache is not None
        local_columns = 0 if cache is None else cache.local_columns
        context = self._last_context_length(last_context_length)
        pieces = list(plan(T, local_columns, self.config.max_position_embeddings, context, keep))
        differentiable = cache is None and torch.is_grad_enabled()
        if counts is not None:
            pieces, layers = [Piece(slice(0, T), False, "dropped")], self._fresh_layers(counts)
        elif differentiable:
            layers = self._fresh_layers(None)
        else:
            if cache is None:
                cache = self.new_cache(B, memory=memory or "exact")
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
            starts = cache.local if cache is not None else none
            if there is None:
                batch = Batch.dense(starts, part.shape[1], part.device)
            else:
                batch = Batch.packed(starts, tuple(there.sum(1).tolist()), part.device)
                part = part[there][None]
            segment = Segment(batch, cache.remembered if cache is not None else none, piece.fate, index)
            hidden = self.model(part, layers, segment, self._parts)
            if cache is not None:
                cache.advance(batch, piece.columns.stop - piece.columns.start, piece.fate)
                if index == len(pieces) - 1:
                    cache.commit()
            if there is not None:
                grid = hidden.new_zeros(*there.shape, hidden.shape[-1])
                grid[there] = hidden[0]
                hidden = grid
            yield piece.columns, hidden

    def _parts(self, x: torch.Tensor) -> Parts:
        return compiled_parts(torch.is_grad_enabled()) if self.compiles(x) else PLAIN

    def _fresh_layers(self, counts: tuple[int, ...] | None) -> list[Any]:
        """Layer caches of a pass with gradients; crossbatch in the memory layers if there are counts."""
        return [
            FreshLocal()
            if i not in self.config.mem_layers
            else FreshMemory()
            if counts is None
            else CrossbatchMemory(counts)
            for i in range(self.config.num_hidden_layers)
        ]

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
        inputs = reading.read_inputs(shape, device, attention_mask, None, cache.lengths, cache.columns)
        last = None  # without padding, the last column
        if inputs.real is not None:
            if bool((inputs.real.sum(1) == 0).any()):
                raise ValueError("attention_mask has a row without tokens; prefill needs at least one in each.")
            last = (torch.arange(shape[1], device=device) * inputs.real).argmax(1)
        hidden = torch.empty(shape[0], self.config.hidden_size, dtype=self.dtype, device=device)
        for columns, part in self._windows(input_ids, inputs.real, cache, last_context_length, None):
            if last is not None:
                ending = (last >= columns.start) & (last < columns.stop)
                hidden[ending] = part[ending, last[ending] - columns.start]
            elif columns.stop == shape[1]:
                hidden = part[:, -1]
            if progress is not None:
                progress(columns.stop)
        return self.lm_head(hidden)

    # -- checks ---------------------------------------------------------------------------------------------------

    def _last_context_length(self, given: int | None) -> int:
        length = self.config.last_context_length if given is None else given
        assert length is not None, "the configuration sets it"
        check_whole(1, last_context_length=length)
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"last_context_length must be from 1 to the window of {self.config.max_position_embeddings}, "
                f"got {length}."
            )
        return length

    def _crossbatch(
        self,
        tokens: torch.Tensor,
        cache: LongLlamaCache | None,
        attention_mask: torch.Tensor | None,
        cross_batch_range: int | None,
        stepping: bool | None,
        packing: int | None,
    ) -> tuple[int, ...] | None:
        """How many rows before it each row sees; None without crossbatch."""
        config = self.config
        if cross_batch_range is None and self.training and cache is None:
            cross_batch_range = config.cross_batch_range
        if cross_batch_range is None:
            return None
        check_whole(0, cross_batch_range=cross_batch_range)
        if cross_batch_range == 0:
            return None
        B, T = tokens.shape[:2]
        if not config.mem_layers:
            raise ValueError("crossbatch needs memory layers; this model's mem_layers is empty.")
        if cache is not None:
            raise ValueError("crossbatch is a way of training: it goes without past_key_values.")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("crossbatch takes full rows only; put documents side by side instead of padding them.")
        if config.max_position_embeddings < T:
            raise ValueError(
                f"a row of crossbatch is one context: at most {config.max_position_embeddings} tokens "
                f"(max_position_embeddings), got {T}."
            )
        stepping = config.cross_batch_stepping if stepping is None else stepping
        return earlier_contexts(B, cross_batch_range, stepping, config.dataset_packing if packing is None else packing)


class _Wanted:
    """Collects the hidden states whose logits are asked for, window by window."""

    def __init__(self, logits_to_keep: Any, inputs: reading.Inputs, tokens: torch.Tensor) -> None:
        self.nothing = logits_to_keep is reading.NOTHING
        self.mask: torch.Tensor | None = None
        self.parts: list[torch.Tensor] = []
        self.places: list[torch.Tensor] = []  # of each part's rows or columns, in the caller's order
        if self.nothing:
            return
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dim() == 2:
            self.mask = reading.check_mask(logits_to_keep.to(tokens.device, torch.bool), inputs, tokens.shape)
            self.rank = self.mask.flatten().cumsum(0).view(self.mask.shape) - 1
            return
        T = tokens.shape[1]
        columns = reading.wanted_columns(logits_to_keep, T, tokens.device)
        self.columns = torch.arange(T, device=tokens.device)[columns]

    def take(self, columns: slice, hidden: torch.Tensor) -> None:
        """Keep what is wanted of hidden [B, t, d] at `columns`."""
        if self.nothing:
            return
        if self.mask is not None:
            here = self.mask[:, columns]
            self.parts.append(hidden[here])
            self.places.append(self.rank[:, columns][here])
            return
        place = ((self.columns >= columns.start) & (self.columns < columns.stop)).nonzero().squeeze(1)
        self.parts.append(hidden[:, self.columns[place] - columns.start])
        self.places.append(place)

    def hidden(self) -> torch.Tensor | None:
        """[B, P, d], or [number of True, d] for a mask, in the caller's order."""
        if self.nothing:
            return None
        dim = 0 if self.mask is not None else 1
        whole, places = torch.cat(self.parts, dim), torch.cat(self.places)
        if bool((places[1:] > places[:-1]).all()):
            return whole
        return whole.index_select(dim, places.argsort())
