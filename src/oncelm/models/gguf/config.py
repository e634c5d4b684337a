"""A LLaMA's configuration from a GGUF file's metadata; every key that changes the mathematics is read or refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

from oncelm.models.gguf.header import Header, short
from oncelm.models.gguf.rope import rope_parameters, shortest
from oncelm.utils.errors import check_positive, check_whole

logger = logging.getLogger(__name__)

LLAMA = "llama."
HEADS, KV_HEADS = f"{LLAMA}attention.head_count", f"{LLAMA}attention.head_count_kv"
KEY_LENGTH, VALUE_LENGTH = f"{LLAMA}attention.key_length", f"{LLAMA}attention.value_length"
ROPE_DIM = f"{LLAMA}rope.dimension_count"
WIDTH, BLOCKS, INNER = f"{LLAMA}embedding_length", f"{LLAMA}block_count", f"{LLAMA}feed_forward_length"
CONTEXT, VOCAB, EPS = f"{LLAMA}context_length", f"{LLAMA}vocab_size", f"{LLAMA}attention.layer_norm_rms_epsilon"
WINDOW = f"{LLAMA}attention.sliding_window"
REQUIRED = (HEADS, WIDTH, BLOCKS, INNER, CONTEXT)
OPTIONAL = (KV_HEADS, VOCAB, KEY_LENGTH, VALUE_LENGTH, ROPE_DIM)
SCALING = tuple(
    f"{LLAMA}rope.{name}"
    for name in (
        "freq_base",
        "scale_linear",
        "scaling.type",
        "scaling.factor",
        "scaling.original_context_length",
        "scaling.finetuned",  # whether the model was trained so: no number of the model
        "scaling.yarn_beta_fast",
        "scaling.yarn_beta_slow",
        "scaling.yarn_attn_factor",
    )
)
READ = {*REQUIRED, *OPTIONAL, *SCALING, EPS, WINDOW}
# What a LLaMA of transformers does not do, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    LLAMA + name: values
    for name, values in {
        "tensor_data_layout": ("Meta AI original pth",),  # the order of q and k rows that every such file has
        "use_parallel_residual": (False,),
        "attention.causal": (True,),
        "attention.scale": (0,),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "attn_logit_softcapping": (0,),
        "final_logit_softcapping": (0,),
        "logit_scale": (0, 1),
        "embedding_scale": (0, 1),
        "residual_scale": (0, 1),
        "pooling_type": (0,),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "expert_shared_count": (0,),
        "leading_dense_block_count": (0,),
        "nextn_predict_layers": (0,),
        "rope.scaling.attn_factor": (1,),
        "rope.scaling.yarn_ext_factor": (1,),
        "rope.scaling.yarn_log_multiplier": (0,),
    }.items()
}


def read_config(path: Path, header: Header, rope_factors: np.ndarray | None) -> LlamaConfig:
    """The configuration, its sizes those of the tensors.

    Args:
        path: named in errors.
        header: of the file.
        rope_factors: the tensor `rope_freqs.weight` if there is one.

    Raises:
        ValueError: another architecture, a part of several files, keys that a LLaMA cannot honour, sizes that are
            missing or not those of the tensors.
    """
    data = header.metadata
    _check_kind(path, data)
    _check_keys(path, data)
    check_whole(1, **{name: data.get(name) for name in REQUIRED})
    check_whole(1, **{name: data[name] for name in OPTIONAL if name in data})
    check_positive(**{EPS: data.get(EPS, 0.0)})
    context = data[CONTEXT]
    window = data.get(WINDOW, 0)
    check_whole(0, **{WINDOW: window})
    if 0 < window < context:
        raise ValueError(f"{path} has {WINDOW} {window}, and {CONTEXT} {context}: a LLaMA attends to all of it.")
    head_dim = _head_dim(path, header)
    return LlamaConfig(
        vocab_size=_vocab_size(path, header),
        hidden_size=data[WIDTH],
        intermediate_size=data[INNER],
        num_hidden_layers=_blocks(path, header),
        num_attention_heads=data[HEADS],
        num_key_value_heads=data.get(KV_HEADS, data[HEADS]),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=shortest(data[EPS]),
        rope_parameters=rope_parameters(data, head_dim, context, rope_factors),
        tie_word_embeddings="output.weight" not in header.tensors,
        attention_bias=_any_bias(header.tensors, ".attn_"),
        mlp_bias=_any_bias(header.tensors, ".ffn_"),
        bos_token_id=None,  # the tokenizer's are set with it
        eos_token_id=None,
    )


def _check_kind(path: Path, data: dict[str, Any]) -> None:
    architecture, kind, parts = data.get("general.architecture"), data.get("general.type"), data.get("split.count", 1)
    if architecture != "llama":
        raise ValueError(
            f"{path} is a GGUF file of architecture {architecture!r}; only LLaMA-family models ('llama') can be read."
        )
    if kind not in (None, "model"):
        raise ValueError(f"{path} is a GGUF file of type {kind!r}; only those of type 'model' can be read.")
    if parts not in (0, 1):
        raise ValueError(
            f"{path} is one of {parts} files of one model (split.count); join them first: llama-gguf-split --merge."
        )


def _check_keys(path: Path, data: dict[str, Any]) -> None:
    """Refuse `llama.*` keys that are not known to be read or to mean nothing; name what other programs noted."""
    for key in data:
        if key.startswith(LLAMA) and key not in READ and not _is_neutral(key, data[key]):
            neutral = f" (only {' or '.join(map(repr, NEUTRAL[key]))})" if key in NEUTRAL else ""
            raise ValueError(
                f"{path} has {key} {short(data[key])}, which the converted model would not honour{neutral}."
            )
    prefixes = (LLAMA, "general.", "tokenizer.", "split.", "quantize.")
    notes = [key for key in data if not key.startswith(prefixes) or key.startswith("general.sampling.")]
    if notes:
        logger.warning("%s: not read: %s.", path, ", ".join(notes))


def _is_neutral(key: str, value: object) -> bool:
    return isinstance(value, str | Real) and value in NEUTRAL.get(key, ())


def _head_dim(path: Path, header: Header) -> int:
    """The size of a head, the same by all that the file says of it."""
    data = header.metadata
    heads = data[HEADS]
    said_by = next((name for name in (KEY_LENGTH, ROPE_DIM) if name in data), None)
    head_dim = data[said_by] if said_by else data[WIDTH] // heads
    for name, count, tensor in ((HEADS, heads, "attn_q"), (KV_HEADS, data.get(KV_HEADS, heads), "attn_k")):
        shape = _shape(header, f"blk.0.{tensor}.weight")
        if shape and shape[0] != count * head_dim:
            raise ValueError(
                f"{path} has {name} {count}: of dimension {head_dim} they are {count * head_dim} rows of "
                f"blk.0.{tensor}.weight, which has {shape[0]} (the dimension is by {said_by or WIDTH})."
            )
    for name in (KEY_LENGTH, VALUE_LENGTH, ROPE_DIM):
        if data.get(name, head_dim) != head_dim:
            raise ValueError(f"{path} has {name} {data[name]} and heads of dimension {head_dim}; a LLaMA has one size.")
    if head_dim % 2:
        raise ValueError(f"{path} has heads of dimension {head_dim}; RoPE turns pairs.")
    return int(head_dim)


def _vocab_size(path: Path, header: Header) -> int:
    shape = _shape(header, "token_embd.weight")
    rows = shape[0] if shape else header.metadata.get(VOCAB, 0)
    if (asked := header.metadata.get(VOCAB, rows)) != rows:
        raise ValueError(
            f"{path}: token_embd.weight is {list(shape)}, its metadata asks for {[asked, header.metadata[WIDTH]]}."
        )
    return int(rows)


def _blocks(path: Path, header: Header) -> int:
    """The number of blocks; from here on no loop runs over more blocks than there are tensors."""
    asked = int(header.metadata[BLOCKS])
    blocks = len({name.split(".")[1] for name in header.tensors if name.startswith("blk.")})
    if asked != blocks:
        raise ValueError(f"{path} has {BLOCKS} {asked} and the tensors of {blocks} blocks.")
    return asked


def _shape(header: Header, name: str) -> tuple[int, ...]:
    tensor = header.tensors.get(name)
    return tensor.shape if tensor and math.prod(tensor.shape) else ()


def _any_bias(names: Iterable[str], part: str) -> bool:
    return any(part in name and name.endswith(".bias") for name in names)
