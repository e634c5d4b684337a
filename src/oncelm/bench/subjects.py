"""What is measured: a model behind the same few calls, whatever its cache is. peer.py has the other one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from oncelm.cache import YocoCache
from oncelm.models import YocoConfig, YocoForCausalLM
from oncelm.models.inputs import NOTHING
from oncelm.models.work import WorkCounts
from oncelm.models.yoco.mixers import find_mixer
from oncelm.models.yoco.work import YocoWork
from oncelm.ops.quantize import LARGEST


class Subject(Protocol):
    """A model under measurement. Ids are [B, T]; a cache is whatever `prefill` returns."""

    name: str
    settings: dict[str, Any]  # how it is run, for the record
    compiled: bool  # by torch.compile, so that the first call of a kind takes much longer
    kv_dtype: torch.dtype  # of the keys and values in its cache

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def work(self) -> WorkCounts: ...

    def shape(self) -> dict[str, Any]:
        """The configuration keys that fix sizes, for the record."""
        ...

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of one pass over all of `ids`, in plain PyTorch: what faster ways are compared with."""
        ...

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of the same pass, as training computes it."""
        ...

    def prefill(self, ids: torch.Tensor, room: int = 0, chunk_size: int | None = None) -> tuple[torch.Tensor, Any]:
        """Read `ids` from the start: logits [B, V] of the last token, and a cache with room for `room` more.

        `chunk_size` None means the subject's own choice.
        """
        ...

    def context(self, batch_size: int, tokens: int, room: int) -> Any:
        """A cache as it is behind `tokens` tokens, for timing what follows."""
        ...

    def step(self, token: torch.Tensor, cache: Any) -> torch.Tensor:
        """Append token [B, 1]: logits [B, V]."""
        ...

    def cache_bytes(self, cache: Any) -> int: ...


def default_config(
    hidden_size: int = 512, num_layers: int = 12, self_decoder: str = "gated_retention", **changes: Any
) -> YocoConfig:
    """A shape that a CPU measures in minutes, in the paper's proportions, with any keys changed.

    Half the layers are self-decoder, feed-forward 3 d, retention heads of 256, attention heads of 64, two query heads
    a key/value head. 32,000 is LLaMA's vocabulary: at this width a larger one would weigh more than all layers.
    """
    heads = hidden_size // 64
    return YocoConfig(
        **{
            "vocab_size": 32000,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_self_decoder_layers": num_layers - num_layers // 2,
            "num_cross_decoder_layers": num_layers // 2,
            "self_decoder": self_decoder,
            "num_self_heads": max(1, hidden_size // find_mixer(self_decoder).usual_head_dim),
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            **changes,
        }
    )


class Yoco:
    """A YOCO, prefilled in chunks with early exit into a preallocated cache.

    Args:
        prefill_chunk_size: None leaves it to the model, which looks at the free memory.
        compile: see `YocoForCausalLM.compile_layers`.
        gemm: see `YocoForCausalLM.set_gemm`.
    """

    name = "YOCO"

    def __init__(
        self,
        model: YocoForCausalLM,
        prefill_chunk_size: int | None = None,
        compile: bool = False,
        gemm: str | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model.compile_layers(compile).set_gemm(gemm)
        self.kv_dtype = kv_dtype or model.dtype
        a_scale = 4 / model.config.head_dim if self.kv_dtype in LARGEST else 0
        self.work = YocoWork(model.config, model.dtype.itemsize, self.kv_dtype.itemsize + a_scale)
        self.prefill_chunk_size, self.compiled = prefill_chunk_size, compile
        self.settings = {
            "cache": "YocoCache, preallocated",
            "kv_dtype": str(self.kv_dtype).removeprefix("torch."),
            "prefill_chunk_size": prefill_chunk_size,  # the one in use, as soon as there is one
            "compiled": "token-wise parts of layers" if compile else "",
            "gemm": gemm or str(model.dtype).removeprefix("torch."),
        }

    def shape(self) -> dict[str, Any]:
        return {key: getattr(self.model.config, key) for key in YocoConfig.own_keys()}

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        gemm = self.model.gemm
        self.model.compile_layers(False).set_gemm(None)
        logits = self.model(ids, use_cache=False).logits
        self.model.compile_layers(self.compiled).set_gemm(gemm)
        return logits

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, labels=ids, use_cache=False, logits_to_keep=NOTHING).loss

    def prefill(
        self, ids: torch.Tensor, room: int = 0, chunk_size: int | None = None
    ) -> tuple[torch.Tensor, YocoCache]:
        cache = self.model.new_cache(ids.shape[0], ids.shape[1] + room, self.kv_dtype)
        size = chunk_size or self.prefill_chunk_size or self.model.prefill_chunk_size(ids.shape[0])
        self.settings["prefill_chunk_size"] = size
        return self.model.prefill(ids, cache, size), cache

    def context(self, batch_size: int, tokens: int, room: int) -> YocoCache:
        ids = torch.zeros(batch_size, tokens, dtype=torch.long, device=self.model.device)
        return self.prefill(ids, room)[1]

    def step(self, token: torch.Tensor, cache: YocoCache) -> torch.Tensor:
        return self.model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    def cache_bytes(self, cache: YocoCache) -> int:
        return cache.nbytes()
