"""YOCO as a Hugging Face causal language model: forward, loss, chunked prefill, generate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from oncelm.cache import FreshShared, HeldPast, Pasts, Selection, SharedKV, Snapshot, YocoCache
from oncelm.cache.yoco.shared_kv import STORED_DTYPES
from oncelm.models import inputs as reading
from oncelm.models.causal_lm import CausalLM, check_cache_size
from oncelm.models.checks import check_tokens, fingerprint
from oncelm.models.extras import one_of, read_extras
from oncelm.models.head import head_loss
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.execution import Execution
from oncelm.models.yoco.mixers import Room, mixers_of
from oncelm.models.yoco.model import CrossDecoder, SelfDecoder, run_layers
from oncelm.models.yoco.stepper import Stepper, stepper
from oncelm.ops import vocab_parallel_cross_entropy
from oncelm.ops.quantize import LARGEST
from oncelm.utils.errors import check_choice, check_whole


class YocoForCausalLM(Execution, CausalLM):
    """A decoder-decoder language model (arXiv 2405.05254). Parameters carry the official checkpoint's names."""

    config_class = YocoConfig
    config: YocoConfig
    base_model_prefix = ""
    _tied_weights_keys = {"output_projection.weight": "embed_tokens.weight"}  # noqa: RUF012
    cache_keys = (
        "self_decoder", "num_self_decoder_layers", "hidden_size", "num_self_heads", "self_kv_heads", "window_size",
        "num_cross_decoder_layers", "num_attention_heads", "shared_kv_heads",
    )  # fmt: skip
    kv_dtypes = ("bfloat16", "float8", "int8")
    packs_rows = True
    gemms = ("float8",)
    has_official_format = True
    use_cuda_graphs = True  # for decode steps on a GPU; False goes back to plain PyTorch

    def __init__(self, config: YocoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_decoder = SelfDecoder(config)
        self.cross_decoder = CrossDecoder(config) if config.num_cross_decoder_layers else None
        self.layer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output_projection = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The official code's initialisation."""
        if getattr(module, "xavier_gain", None) is not None:
            init.xavier_uniform_(module.weight, gain=module.xavier_gain)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.output_projection

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.output_projection = value

    # -- caches ---------------------------------------------------------------------------------------------------

    def new_cache(
        self, batch_size: int = 1, max_tokens: int | None = None, dtype: torch.dtype | None = None
    ) -> YocoCache:
        """A preallocated cache on the model's device.

        Args:
            batch_size: sequences.
            max_tokens: capacity of each sequence; None starts small and doubles as needed.
            dtype: of keys and values; None means the model's. torch.float8_e4m3fn and torch.int8 store those of all
                tokens in 8 bits, with a float32 scale a token and head; windows then keep the model's dtype. States are
                always float32.
        """
        check_cache_size(batch_size, max_tokens)
        config, device = self.config, self.cache_device
        dtype = dtype or self.dtype
        check_choice("dtype of a cache", dtype, STORED_DTYPES)
        room = Room(batch_size, max_tokens, dtype, dtype if dtype not in LARGEST else self.dtype, device)
        layers = [mixer.new_cache(config, room) for mixer in mixers_of(config)]
        shared = None
        if config.num_cross_decoder_layers:
            shared = SharedKV(batch_size, max_tokens, config.shared_kv_heads, config.head_dim, dtype, device)
        return YocoCache(layers, shared, batch_size, max_tokens, self._cache_settings())

    def _fresh_past(self) -> Pasts:
        return Pasts([mixer.fresh_past(self.config) for mixer in mixers_of(self.config)], FreshShared())

    def mark(self, cache: YocoCache) -> Snapshot:
        """A rewind point: shared keys and values stay where they are, and must not be overwritten."""
        return cache.snapshot(shared=False)

    def rewind(self, cache: YocoCache, mark: Snapshot) -> YocoCache:
        cache.restore(mark)
        return cache

    def reuse(self, cache: YocoCache) -> YocoCache:
        cache.reset()  # its memory, and what is recorded to decode in it, stay
        return cache

    def fingerprint(self) -> str:
        """A short hash of the configuration and of a sample of every parameter: whose cache a file is."""
        return fingerprint(self, YocoConfig.own_keys())

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: YocoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        past: HeldPast | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, loss, or both; the cross-decoder runs only on the positions that they need.

        Args:
            input_ids: [B, T] token ids. Without padding, they, labels and cu_seqlens may be on the CPU while
                the model is on a GPU: they are checked there, and nothing waits for the GPU.
            attention_mask: [B, T], or [B, earlier + T] with a cache; 0 marks padding. Padding is left out of all
                computation; positions count real tokens.
            position_ids: [B or 1, T]; in one row of packed sequences each begins at 0. Otherwise they must be the
                tokens' places, which the model knows by itself.
            past_key_values: a cache from `new_cache` or an earlier call; the tokens are appended to it.
            inputs_embeds: [B, T, d] instead of input_ids, before scaling by sqrt(d).
            labels: [B, T] targets as in Hugging Face: not shifted, -100 ignored. The loss is the mean over targets.
            use_cache: return a cache; None means config.use_cache in evaluation without labels. A pass with a cache
                computes no gradients.
            logits_to_keep: which logits to return: None or 0 all (with labels in training mode, None means none), n the
                last n columns, a vector the columns at these indices (an empty one: none), or a [B, T] mask of booleans
                (logits [number of True, V]).
            cu_seqlens: [N + 1] borders of N sequences packed into one row of input_ids.
            num_items_in_batch: divide the summed loss by this instead of the number of targets (gradient accumulation).
            targets: [B, T] labels that stand where they are predicted, for rows whose next token is elsewhere.
            past: holds what came before instead of a cache, with gradients: chunks of sequences that other processes
                hold. Its `lengths` count the tokens before this pass.
            output_attentions, output_hidden_states: not offered; True is refused.
            return_dict: False returns a tuple.
            kwargs: what Hugging Face tools pass along: `cu_seq_lens_q` is cu_seqlens, `shift_labels` is targets; names
                that are no model's are refused.

        Returns:
            CausalLMOutputWithPast with `loss`, `logits` [B, P, V] (zeros at padding) and `past_key_values`.

        Raises:
            ValueError: inputs that do not fit the model, the cache or each other; nothing has been changed then.
        """
        outputs = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        cu_seqlens, targets = read_extras(self, kwargs, cu_seqlens, targets, **outputs)
        given = one_of(labels=labels, targets=targets)
        tokens = check_tokens(input_ids, inputs_embeds, self.config, self.cache_device)
        if past is not None and (past_key_values is not None or use_cache):
            raise ValueError("past stands for what came before: give it without past_key_values and use_cache.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and past is None and given is None
        position_ids, attention_mask, cu_seqlens = reading.find_packing(
            *(tokens.shape, tokens.device, position_ids, attention_mask, cu_seqlens),
            starts_anew=past_key_values is None and past is None,
        )
        cache = self._cache(tokens, past_key_values, use_cache, cu_seqlens)
        loss: torch.Tensor | None = None
        logits: torch.Tensor | None = None
        step = None
        if given is None and cu_seqlens is None:
            step = self._graphed_step(input_ids, attention_mask, position_ids, cache, logits_to_keep)
        if step is not None and cache is not None:
            logits = step(tokens, cache).clone()[:, None]
        else:
            before = past if cache is None else cache
            inputs = self._read(tokens, attention_mask, position_ids, cu_seqlens, before)
            if given is not None:
                targets = reading.read_targets(labels, targets, inputs, tokens.shape, self.config.vocab_size)
                if reading.is_nothing(logits_to_keep, self.training):
                    logits_to_keep = reading.NOTHING
            # a cache holds values, not graphs: with gradients on, the earlier tokens' share would be missing silently
            with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
                loss, logits = self._loss_and_logits(
                    tokens, inputs, before, targets, logits_to_keep, num_items_in_batch
                )
        return self._output(CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache), return_dict)

    def hidden_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: YocoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
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
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not torch.is_grad_enabled()
        position_ids, attention_mask, cu_seqlens = reading.find_packing(
            tokens.shape, tokens.device, position_ids, attention_mask, cu_seqlens, past_key_values is None
        )
        cache = self._cache(tokens, past_key_values, use_cache, cu_seqlens)
        inputs = self._read(tokens, attention_mask, position_ids, cu_seqlens, cache)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            hidden = self._hidden(tokens, inputs, cache, Selection(inputs.batch, columns=slice(None)))
            if inputs.real is not None:
                hidden = hidden.new_zeros(*inputs.real.shape, hidden.shape[-1]).index_put((inputs.real,), hidden[0])
        return self._output(BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache), return_dict)

    def _cache(
        self,
        tokens: torch.Tensor,
        given: YocoCache | None,
        use_cache: bool,
        cu_seqlens: torch.Tensor | None,
    ) -> YocoCache | None:
        """The cache of a forward pass: the given one, a new one where one is wanted, or none."""
        if given is not None:
            self._check_cache(given)
            return given
        if not use_cache:
            return None
        rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        return self.new_cache(max(rows, 1))

    def _read(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        before: HeldPast | None,
    ) -> reading.Inputs:
        return reading.read_inputs(
            tokens.shape,
            tokens.device,
            attention_mask,
            cu_seqlens,
            None if before is None else before.lengths,
            before.columns if isinstance(before, YocoCache) else 0,
            position_ids,
        )

    def _loss_and_logits(
        self,
        tokens: torch.Tensor,
        inputs: reading.Inputs,
        past: HeldPast | None,
        targets: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor | None,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The wanted ones of the two, from one run of the layers."""
        shape, T, device = tokens.shape, inputs.columns, tokens.device
        keep_mask = isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dim() == 2
        dense = inputs.batch.cu_seqlens is None
        if targets is None and dense and not keep_mask:
            columns = reading.wanted_columns(logits_to_keep, T, device)
            hidden = self._hidden(tokens, inputs, past, inputs.batch.columns(columns))
            return None, self.output_projection(hidden)
        counted = None if targets is None else targets != reading.IGNORE_INDEX
        if targets is not None and counted is not None and logits_to_keep is reading.NOTHING and dense and T > 1:
            # plain training: every column has a target, but perhaps the last one
            wrong = reading.outside(targets, self.config.vocab_size).any()
            body, last, any_last, is_wrong = torch.stack(
                (counted[:, :-1].all(), counted[:, -1].all(), counted[:, -1].any(), wrong)
            ).tolist()
            if is_wrong:
                reading.check_range(targets, self.config.vocab_size)
            if body and last == any_last:
                first = slice(0, T if last else T - 1)
                hidden = self._hidden(tokens, inputs, past, inputs.batch.columns(first))
                return self._loss(hidden.flatten(0, 1), targets[:, first].flatten(), num_items_in_batch), None
        elif targets is not None and targets.device.type != "cpu":
            reading.check_range(targets, self.config.vocab_size)
        if targets is not None and counted is not None and logits_to_keep is reading.NOTHING:
            hidden = self._hidden(tokens, inputs, past, inputs.select(counted))[0]  # [count, d]
            return self._loss(hidden, targets[counted], num_items_in_batch), None
        # any positions: compute the union of those that the loss and the logits need, as a packed row
        if targets is not None and counted is not None:
            targets, counted = targets.to(device), counted.to(device)
        kept = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        wanted: slice | torch.Tensor | None = None
        if keep_mask:
            assert isinstance(logits_to_keep, torch.Tensor)
            kept |= reading.check_mask(logits_to_keep.to(device, torch.bool), inputs, shape)
        elif logits_to_keep is not reading.NOTHING:
            wanted = reading.wanted_columns(logits_to_keep, T, device)
            kept[:, wanted] = True
            if inputs.real is not None:
                kept &= inputs.real
        computed = kept if counted is None else kept | counted
        hidden = self._hidden(tokens, inputs, past, inputs.select(computed))[0]  # [count, d]
        rank = computed.flatten().cumsum(0).view(shape[:2]) - 1  # row of `hidden` of each computed position
        loss = logits = None
        if targets is not None and counted is not None:
            loss = self._loss(hidden[rank[counted]], targets[counted], num_items_in_batch)
        if keep_mask:
            logits = self.output_projection(hidden[rank[kept]])
        elif wanted is not None:
            there = kept[:, wanted]
            picked = hidden.new_zeros(*there.shape, hidden.shape[-1])
            picked[there] = hidden[rank[:, wanted][there]]
            logits = self.output_projection(picked)
        return loss, logits

    def _hidden(
        self, tokens: torch.Tensor, inputs: reading.Inputs, past: HeldPast | None, wanted: Selection | None
    ) -> torch.Tensor:
        """Final hidden states [B, P, d] at `wanted` (None: [1, 0, d]); a cache moves on behind the tokens."""
        if isinstance(past, YocoCache):
            past.check_room(inputs.batch.lengths)
            past.begin()
        embeddings = self.embed(inputs.gather(tokens))
        before = self._fresh_past() if past is None else past
        decoders = self.self_decoder, self.cross_decoder
        x = run_layers(self.config, *decoders, embeddings, inputs.batch, before, wanted, self.token_parts)
        if isinstance(past, YocoCache):
            past.commit(inputs.batch, inputs.columns)
        return embeddings.new_empty(1, 0, self.config.hidden_size) if x is None else self.layer_norm(x)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input of the first layer [B, T, d], of ids [B, T] or of embeddings [B, T, d] before scaling."""
        embeddings = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        return embeddings * math.sqrt(self.config.hidden_size) if self.config.scale_embeddings else embeddings

    def _loss(self, hidden: torch.Tensor, targets: torch.Tensor, num_items: int | torch.Tensor | None) -> torch.Tensor:
        """Mean cross-entropy of hidden [M, d] against targets [M]; 0 where there is no target at all."""
        targets = targets.to(hidden.device, non_blocking=True)
        weight = getattr(self.output_projection, "weight", None)
        if isinstance(weight, DTensor):  # split over ranks, in training
            total = vocab_parallel_cross_entropy(hidden, weight, targets)
        else:
            total = head_loss(self.output_projection, hidden, targets)
        return total / (max(len(targets), 1) if num_items is None else num_items)

    # -- one token at a time ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: YocoCache) -> torch.Tensor:
        """Append tokens [N, 1], one a sequence, to a cache: logits [N, V]. On a GPU a CUDA graph (stepper.py).

        `forward` does this by itself where it is given one token and a cache on a GPU, unless adapters, hooks or other
        things are in the model that a graph would pass over, or `model.use_cuda_graphs` is False.
        """
        step = self._stepper(cache)
        if step is not None:
            return step(tokens, cache).clone()
        inputs = self._read(tokens, None, None, None, cache)
        return self.output_projection(self._hidden(tokens, inputs, cache, inputs.batch.columns(slice(None))))[:, -1]

    def _stepper(self, cache: YocoCache) -> Stepper | None:
        """What takes a step with this cache, which then has room for it; None where no graph stands for the model."""
        if not self.use_cuda_graphs:
            return None
        cache.check_room((1,) * cache.batch_size)
        cache.reserve(cache.num_tokens + 1)
        found = stepper(self, cache)
        return found if found.is_plain else None

    def _graphed_step(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: YocoCache | None,
        logits_to_keep: int | torch.Tensor | None,
    ) -> Stepper | None:
        """What takes this forward pass as a step, if it is one new token of every sequence of a cache, on a GPU, and
        nothing else."""
        if (
            cache is None
            or input_ids is None
            or not input_ids.is_cuda
            or input_ids.shape != (cache.batch_size, 1)
            or not (logits_to_keep is None or (isinstance(logits_to_keep, int) and logits_to_keep in (0, 1)))
            or cache.recording
            or not reading.is_next_token(attention_mask, position_ids, cache.lengths, cache.columns)
        ):
            return None
        return self._stepper(cache)

    # -- reading long input ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor,
        cache: YocoCache,
        chunk_size: int | None = None,
        attention_mask: torch.Tensor | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> torch.Tensor:
        """Read any number of tokens into `cache`, chunk by chunk; may be called again to append.

        The cross-decoder runs on the last token of each sequence only (early exit, section 2.3).

        Args:
            input_ids: [B, T].
            cache: from `new_cache`.
            chunk_size: tokens of each row in a chunk; None means `prefill_chunk_size(B)`, which follows from the free
                memory. Memory for activations is proportional to it.
            attention_mask: [B, T], 0 at padding.
            progress: called after each chunk with the number of columns read so far.

        Returns:
            Logits [B, V] of each sequence's last token.
        """
        if chunk_size is not None:
            check_whole(1, chunk_size=chunk_size)
        input_ids = check_tokens(input_ids, None, self.config)
        self._check_cache(cache)
        B, T = input_ids.shape
        size = chunk_size or self.prefill_chunk_size(B)
        device = input_ids.device
        inputs = reading.read_inputs(input_ids.shape, device, attention_mask, None, cache.lengths, cache.columns)
        cache.check_room(inputs.batch.lengths)
        real = inputs.real
        if real is not None and not bool(real.any(1).all()):
            raise ValueError("attention_mask leaves a row without any token.")
        # column of each row's last token
        lasts = [T - 1] * B if real is None else (T - 1 - real.flip(1).int().argmax(1)).tolist()
        rows: list[int] = []  # whose last token has been read, and its hidden state
        found: list[torch.Tensor] = []
        # a GPU works behind this loop: without padding, nothing in it waits for a value
        for start in range(0, T, size):
            end = min(start + size, T)
            chunk = input_ids[:, start:end]
            mask = None if real is None else real[:, start:end]
            read = reading.read_inputs(chunk.shape, device, mask, None, cache.lengths, cache.columns)
            ending = [row for row, last in enumerate(lasts) if start <= last < end]
            wanted = None
            if read.real is None and lasts == [end - 1] * B:
                wanted = read.batch.columns(slice(end - start - 1, end - start))
            elif ending:
                grid = torch.zeros_like(chunk, dtype=torch.bool)
                grid[ending, [lasts[row] - start for row in ending]] = True
                wanted = read.select(grid)
            rows += ending
            found.append(self._hidden(chunk, read, cache, wanted).flatten(0, 1))
            if progress is not None:
                progress(end)
        hidden = torch.cat(found)
        if rows != sorted(rows):
            hidden = hidden[[rows.index(row) for row in range(B)]]
        return self.output_projection(hidden)
