"""How an engine is set up, with vLLM's names where the idea is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from oncelm.utils.constraints import Count, Flag, Keyed, Number, OneOf, Text, Whole, check_all, constraints_of
from oncelm.utils.device import KV_DTYPES
from oncelm.utils.errors import check_choice


class Limits(NamedTuple):
    """Options that depend on the device where nobody has chosen them; see there."""

    max_num_batched_tokens: int
    max_prefill_tokens_beside_decodes: int
    page_size: int


@dataclass(frozen=True)
class EngineOptions:
    """The settings of `LLM` and `Engine`.

    Attributes:
        max_model_len: tokens of a prompt and its answer at most; None: what the model was trained on
            (`max_position_embeddings`), or less if memory does not hold it.
        max_num_seqs: requests that run at once at most; others wait.
        max_num_batched_tokens: tokens that a step reads at most; None: 16,384 on a GPU, 2,048 on a CPU.
        max_prefill_tokens_beside_decodes: tokens of prompts that a step reads while answers are written. Fewer keep the
            pace of the answers, more read prompts sooner. None: as many as otherwise.
        gpu_memory_utilization: share of the GPU's memory that weights, caches and activations may take.
        kv_cache_bytes: of caches (pages and slots), instead; None on a CPU: half of the free memory, 4 GiB at most.
        kv_cache_dtype: of the shared keys and values: "auto" (the model's), "bfloat16", "float8", "int8".
        page_size: tokens of a page; None: 256 on a GPU, 64 on a CPU.
        enable_prefix_caching: keep what was read, for requests that begin alike.
        num_snapshots: states kept for that at most on the device; None follows from the memory.
        snapshot_interval: tokens from one of them to the next in a long prompt; there is one at each end anyway.
        cpu_cache_bytes: of CPU memory for what the device has no more room for.
        cache_dir: folder for what shall last longer than the process; None: none.
        disk_cache_bytes: that this folder may take; None: no limit.
        speculative: {"method": "prompt_lookup", "num_tokens": 7}, for answers that quote their prompt; None: off.
        seed: of requests that have none of their own.
        verbose: print the plan of the memory before it is taken.
    """

    max_model_len: Count | None = None
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count | None = None
    max_prefill_tokens_beside_decodes: Count | None = None
    gpu_memory_utilization: Annotated[float, Number(0, 1, open_low=True)] = 0.9
    kv_cache_bytes: Count | None = None
    kv_cache_dtype: Annotated[str, OneOf(tuple(KV_DTYPES))] = "auto"
    page_size: Count | None = None
    enable_prefix_caching: Annotated[bool, Flag()] = True
    num_snapshots: Annotated[int | None, Whole(0)] = None
    snapshot_interval: Count = 8192
    cpu_cache_bytes: Annotated[int, Whole(0)] = 0
    cache_dir: Annotated[str | None, Text()] = None
    disk_cache_bytes: Count | None = None
    speculative: Annotated[
        Mapping[str, Any] | None,
        Keyed({"method": OneOf(("prompt_lookup",)), "num_tokens": Whole(1, 7)}),
    ] = None
    seed: Annotated[int, Whole(0)] = 0
    verbose: Annotated[bool, Flag()] = True

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in check_all(values, constraints_of(EngineOptions)).items():
            object.__setattr__(self, name, value)
        for key in self.speculative or ():
            check_choice("key of speculative", key, ("method", "num_tokens"))
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "a step has a token of each request that writes."
            )

    def make_folder(self) -> None:
        """Make `cache_dir`, if it is not there; ValueError where that cannot be, before anything is read in vain."""
        if self.cache_dir is not None:
            try:
                Path(self.cache_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"cache_dir={self.cache_dir!r} is no folder, and cannot be made one: {error}."
                ) from None

    def limits(self, device_type: str) -> Limits:
        """Those that were given, and for the others what suits the device."""
        on_gpu = device_type == "cuda"
        tokens = self.max_num_batched_tokens or max(16384 if on_gpu else 2048, self.max_num_seqs)
        beside = self.max_prefill_tokens_beside_decodes or tokens
        return Limits(tokens, beside, self.page_size or (256 if on_gpu else 64))


def engine_options(options: Mapping[str, Any]) -> EngineOptions:
    """Of keyword arguments; ValueError for an unknown one, with the nearest name."""
    names = [field.name for field in fields(EngineOptions)]
    for name in options:
        check_choice("option", name, names)
    return EngineOptions(**options)
