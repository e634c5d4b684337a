"""YOCO as Hugging Face models: caches, hidden states, logits, chunked prefill, decode steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from oncelm.cache import FreshShared, HeldPast, LayerCache, Past, Pasts, Selection, SharedKV, Snapshot, YocoCache
from oncelm.cache.yoco.shared_kv import STORED_DTYPES
from oncelm.models.base import BaseModel, Pass, check_cache_size
from oncelm.models.causal_lm import CausalLM
from oncelm.models.checks import check_tokens, fingerprint
from oncelm.models.classifiers import SequenceClassifier, TokenClassifier
from oncelm.models.extras import with_arguments_of
from oncelm.models.inputs import Inputs, read_inputs
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.wanted import Wanted
from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.decoding import Decoding
from oncelm.models.yoco.execution import Execution
from oncelm.models.yoco.mixers import Mixer, Room, mixers_of
from oncelm.models.yoco.model import CrossDecoder, SelfDecoder, run_layers
from oncelm.models.yoco.parallel import context_past, tensor_plan
from oncelm.models.yoco.presets import LLAMA_PRESETS, PRESETS, llama_twin
from oncelm.models.yoco.work import YocoWork
from oncelm.ops.quantize import LARGEST
from oncelm.utils.errors import check_choice, check_whole


class YocoModel(Execution, BaseModel):
    """A decoder-decoder model (arXiv 2405.05254) without a head. Parameters carry the official checkpoint's names."""

    config_class = YocoConfig
    config: YocoConfig
    base_model_prefix = ""
    cache_keys = (
        "self_decoder", "num_self_decoder_layers", "num_cross_decoder_layers", "layer_types", "hidden_size",
        "num_self_heads", "self_kv_heads", "window_size", "conv_size", "num_attention_heads", "shared_kv_heads",
    )  # fmt: skip
    title = "YOCO"
    splits = ("tensor_parallel", "context_parallel")
    kv_dtypes = ("bfloat16", "float8", "int8")
    packs_rows = True
    runs_in_engine = True
    quantizations = ("float8",)
    official_format = "oncelm.models.yoco.official"
    presets = {**PRESETS, **LLAMA_PRESETS}  # noqa: RUF012
    own_arguments = ("past",)
    family_heads = ("output_projection", "score")

    def __init__(self, config: YocoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_decoder = SelfDecoder(config)
        self.cross_decoder = CrossDecoder(config) if config.num_cross_decoder_layers else None
        self.layer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.add_head(config)
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
        elif isinstance(module, Mixer):
            module.init_weights()

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
        stores = self.new_stores(config, room, room)
        shared: Any = stores.pop("shared", None)
        layers = list(stores.values())
        return YocoCache(layers, shared, batch_size, max_tokens, self._cache_settings())

    @classmethod
    def new_stores(cls, config: YocoConfig, fixed: Room, growing: Room) -> dict[str, LayerCache]:
        """What a decoding cache consists of, by name: "shared", "layers.0", ...

        Args:
            fixed: the room of what does not grow, states and windows.
            growing: the room of keys and values of all tokens, the shared ones and those of some mixers.
        """
        stores: dict[str, LayerCache] = {}
        if config.num_cross_decoder_layers:  # first: the largest part is refused before memory is taken for the others
            heads = config.shared_kv_heads, config.head_dim
            stores["shared"] = SharedKV(
                growing.batch_size, growing.max_tokens, *heads, growing.kv_dtype, growing.device
            )
        nowhere = fixed._replace(batch_size=1, max_tokens=1, device=torch.device("meta"))
        for i, mixer in enumerate(mixers_of(config)):
            grows = fixed is not growing and mixer.new_cache(config, nowhere).grows
            stores[f"layers.{i}"] = mixer.new_cache(config, growing if grows else fixed)
        return stores

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
        return fingerprint(self, self.config.stated_keys())

    @classmethod
    def work(cls, config: YocoConfig, element_size: int, kv_element_size: float | None = None) -> YocoWork | None:
        known = all(mixer.work(config) is not None for mixer in mixers_of(config))
        return YocoWork(config, element_size, kv_element_size) if known else None

    @classmethod
    def peer_config(cls, config: YocoConfig) -> LlamaConfig:
        return LlamaConfig(**llama_twin(config))

    @classmethod
    def kept_numbers(cls, config: YocoConfig) -> tuple[list[int], int]:
        own = [mixer.kept_numbers(config) for mixer in mixers_of(config)]
        crosses = [3 * config.hidden_size] * config.num_cross_decoder_layers
        return own + crosses, 3 * config.shared_kv_heads * config.head_dim

    tensor_plan = staticmethod(tensor_plan)
    context_past = staticmethod(context_past)

    @classmethod
    def layers_in_words(cls, config: YocoConfig) -> list[tuple[str, str]]:
        kinds = Counter(mixers_of(config)).items()

        def layers(count: int) -> str:
            return "1 layer" if count == 1 else f"{count} layers"

        own = [("self-decoder", f"{layers(count)} of {mixer.describe(config)}") for mixer, count in kinds]
        cross = f"{layers(config.num_cross_decoder_layers)} of attention, {config.num_attention_heads} heads"
        cross += f" of {config.head_dim}, {config.shared_kv_heads} shared key/value heads"
        return [
            *(own or [("self-decoder", "0 layers")]),
            ("cross-decoder", cross),
            ("layout", config.layout),
            ("width", f"{config.hidden_size:,}, feed-forward {config.intermediate_size:,}"),
        ]

    # -- hidden states --------------------------------------------------------------------------------------------

    def _makes_cache(self, own: dict[str, Any], is_packed: bool) -> bool:
        return "past" not in own

    def _check_own(self, own: dict[str, Any], *given: Any) -> dict[str, Any]:
        *_, cache, use_cache = given
        if "past" in own and (cache is not None or use_cache):
            raise ValueError("past stands for what came before: give it without past_key_values and use_cache.")
        return own

    def _states(self, given: Pass, wanted: Wanted) -> Iterator[tuple[slice, torch.Tensor]]:
        inputs, past = given.inputs, given.options.get("past") if given.cache is None else given.cache
        if past is None:
            past = Pasts([mixer.fresh_past(self.config) for mixer in mixers_of(self.config)], FreshShared())
        hidden, everything = self._hidden(given.tokens, inputs, past, wanted.selection), slice(0, inputs.columns)
        yield everything, wanted.within(everything, inputs.spread(hidden)) if wanted.everywhere else hidden

    def _stack(self) -> list[nn.Module]:
        layers = {"self": self.self_decoder.layers}
        if self.cross_decoder is not None:
            layers["cross"] = self.cross_decoder.layers
        return [*(layers[half][i] for half, i in self.config.layer_order), self.layer_norm]

    def _hidden(self, tokens: torch.Tensor, inputs: Inputs, past: Past, wanted: Selection | None) -> torch.Tensor:
        """Final hidden states [B, P, d] at `wanted` (None: [1, 0, d]); a cache moves on behind the tokens."""
        past.check_room(inputs.batch.lengths)
        past.begin()
        embeddings, decoders = self.embed(inputs.gather(tokens)), (self.self_decoder, self.cross_decoder)
        x = run_layers(self.config, *decoders, embeddings, inputs.batch, past, wanted, self.token_parts)
        past.commit(inputs.batch, inputs.columns)
        return embeddings.new_empty(1, 0, self.config.hidden_size) if x is None else self.layer_norm(x)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input of the first layer [B, T, d], of ids [B, T] or of embeddings [B, T, d] before scaling."""
        embeddings = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        return embeddings * math.sqrt(self.config.hidden_size) if self.config.scale_embeddings else embeddings


class YocoForSequenceClassification(SequenceClassifier, YocoModel):
    """A YOCO that sorts texts into classes. The cross-decoder runs on each text's last token only."""


class YocoForTokenClassification(TokenClassifier, YocoModel):
    """A YOCO that sorts tokens into classes. With labels, the cross-decoder runs on the tokens that have one only."""


class YocoForCausalLM(Decoding, CausalLM, YocoModel):
    """A YOCO that predicts the next token: logits, loss, chunked prefill, generate."""

    _tied_weights_keys = {"output_projection.weight": "embed_tokens.weight"}  # noqa: RUF012
    head_names = ("output_projection",)
    others = (YocoModel, YocoForSequenceClassification, YocoForTokenClassification)

    def add_head(self, config: PreTrainedConfig) -> None:
        self.output_projection = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.output_projection

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.output_projection = value

    @with_arguments_of(CausalLM.forward)
    def forward(self, *args: Any, past: HeldPast | None = None, **kwargs: Any) -> CausalLMOutputWithPast | tuple:
        """As `CausalLM.forward`. The cross-decoder runs only on the positions that loss and logits need.

        Args:
            past: holds what came before instead of a cache, with gradients: chunks of sequences that other processes
                hold. Its `lengths` count the tokens before this pass.
        """
        return super().forward(*args, past=past, **kwargs)

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
        inputs = read_inputs(input_ids.shape, device, attention_mask, None, cache.lengths, cache.columns)
        cache.check_room(inputs.batch.lengths)
        real = inputs.real
        if real is not None and not bool(real.any(1).all()):
            raise ValueError("attention_mask leaves a row without any token.")
        lasts = [T - 1] * B if real is None else inputs.last_columns().tolist()
        rows: list[int] = []  # whose last token has been read, and its hidden state
        found: list[torch.Tensor] = []
        # a GPU works behind this loop: without padding, nothing in it waits for a value
        for start in range(0, T, size):
            end = min(start + size, T)
            chunk = input_ids[:, start:end]
            mask = None if real is None else real[:, start:end]
            read = read_inputs(chunk.shape, device, mask, None, cache.lengths, cache.columns)
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
