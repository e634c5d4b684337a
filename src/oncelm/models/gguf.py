"""GGUF files (llama.cpp's format) of LLaMA-family models, read into a Hugging Face model and tokenizer.

The package gguf reads the file and undoes the quantisation. Here all that the file says is honoured or refused by name:
what is left out without a word would give another model. Rows of q and k, which GGUF stores interleaved for its RoPE,
go back to Hugging Face's order.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from oncelm.models import gguf_rope
from oncelm.models.gguf_tokenizer import LISTS, TOKENS, check_tokenizer, end_tokens, read_tokenizer
from oncelm.models.load import check_complete, errors_in_one_line, quiet_transformers
from oncelm.utils.errors import check_whole

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
HEADS, KV_HEADS = "llama.attention.head_count", "llama.attention.head_count_kv"
HEAD_DIM, KEY_DIM, VALUE_DIM = (
    "llama.rope.dimension_count",
    "llama.attention.key_length",
    "llama.attention.value_length",
)
WIDTH, BLOCKS, HIDDEN, EPSILON = (
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.layer_norm_rms_epsilon",
)
VOCABULARY, CONTEXT = "llama.vocab_size", "llama.context_length"
REQUIRED = (HEADS, WIDTH, BLOCKS, HIDDEN, CONTEXT)
OPTIONAL = (KV_HEADS, HEAD_DIM, KEY_DIM, VALUE_DIM, VOCABULARY)
NEUTRAL = {  # of another value they ask for another model
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.use_parallel_residual": (False,),
    "llama.attention.causal": (True,),
    "llama.attention.sliding_window": (0,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.logit_scale": (0.0, 1.0),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.pooling_type": (0,),
}
HARMLESS = ("llama.tensor_data_layout",)  # in words what every file of this architecture has

TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file that calls itself GGUF, or starts as one."""
    file = Path(path)
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return file.suffix == ".gguf" or stream.read(len(MAGIC)) == MAGIC


def read_gguf(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer with its chat template.

    Args:
        path: a GGUF file of architecture llama.
        dtype: of the weights; None means float32.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: damaged, cut off, of another architecture, incomplete, with metadata that are not its tensors', or
            with anything that a Hugging Face LLaMA does not have.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{path}: reading GGUF files needs `pip install 'oncelm[gguf]'`")
    with errors_in_one_line(path), quiet_transformers():
        reader = _open(Path(path))
        fields = {name: field.contents() for name, field in reader.fields.items() if name not in LISTS}
        if fields.get("general.architecture") != "llama":
            raise ValueError(
                f"{path} is a GGUF file of architecture {fields.get('general.architecture')!r}; only LLaMA-family "
                "models ('llama') can be read."
            )
        tokens = len(reader.fields[TOKENS].data) if TOKENS in reader.fields else 0
        shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}  # of [out, in] or [width]
        fields.setdefault(VOCABULARY, tokens)
        _check_keys(path, fields)
        _check_tensors(path, fields, shapes)
        check_tokenizer(path, fields, tokens, rows=fields[VOCABULARY])
        config = _config(path, fields, reader)
        lists = {name: reader.fields[name].contents() for name in LISTS if name in reader.fields}
        tokenizer = read_tokenizer(path, fields, lists)
        model, info = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=_weights(reader, config, dtype or torch.float32),
            dtype=dtype or torch.float32,
            output_loading_info=True,
        )
        check_complete(path, info, shapes_in="its metadata")
    _set_special_tokens(model, fields)
    return model.eval(), tokenizer


def _open(file: Path) -> GGUFReader:
    """The metadata and tensors of a file that is whole."""
    from gguf import GGUFReader

    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{file} is no GGUF file: it does not start with {MAGIC.decode()}.")
    try:
        return GGUFReader(file)
    except Exception as error:  # numpy, enum and unicode errors: of what stands where a number or a name should be
        if isinstance(error, MemoryError):
            raise
        size, kind = file.stat().st_size, type(error).__name__
        raise ValueError(f"{file} is damaged, or cut off after {size:,} bytes ({kind}: {error}).") from error


def _check_keys(path: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    """Refuse metadata that are not honoured, by name, and sizes that are none."""
    known = {*REQUIRED, *OPTIONAL, EPSILON, *HARMLESS, *NEUTRAL, *gguf_rope.KEYS}
    for name, value in fields.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            allowed = ", ".join(map(str, NEUTRAL[name]))
            raise ValueError(f"{path} has {name} {value!r}, which a Hugging Face LLaMA has not; allowed: {allowed}.")
        if name not in known and not name.startswith(("general.", "tokenizer.", "GGUF.", "quantize.", "split.")):
            raise ValueError(f"{path} has {name}, which is not known here: without it this would be another model.")
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one of split.count {fields['split.count']} files; merge them with gguf-split.")
    check_whole(1, **{name: fields.get(name) for name in REQUIRED})
    check_whole(1, **{name: fields[name] for name in OPTIONAL if name in fields})
    epsilon = fields.get(EPSILON)
    if not isinstance(epsilon, float) or not 0 <= epsilon < math.inf:
        raise ValueError(f"{path} has {EPSILON} {epsilon!r}; it must be a number of at least 0.")


def _head_dim(fields: dict[str, Any]) -> int:
    return fields.get(KEY_DIM, fields.get(HEAD_DIM, fields[WIDTH] // fields[HEADS]))


def _check_tensors(path: str | os.PathLike[str], fields: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Refuse tensors that the model does not read, and sizes that are not those of the tensors.

    The file's list of tensors bounds all the work here, whatever sizes its metadata ask for.
    """
    known = {f"{name}.weight" for name in TENSORS} | {gguf_rope.TENSOR}
    numbers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    blocks = {f"blk.{number}.{name}.weight" for number in numbers if number.isdecimal() for name in BLOCK_TENSORS}
    if unread := sorted(shapes.keys() - known - blocks):
        raise ValueError(f"{path} has {unread[0]}, which a Hugging Face LLaMA does not read ({len(unread)} such).")
    heads, head_dim = fields[HEADS], _head_dim(fields)
    kv_heads = fields.get(KV_HEADS, heads)
    for name, count, tensor in ((HEADS, heads, "attn_q"), (KV_HEADS, kv_heads, "attn_k")):
        shape = shapes.get(f"blk.0.{tensor}.weight")
        if shape and shape[0] != count * head_dim:
            raise ValueError(
                f"{path} has {name} {count}: of dimension {head_dim} they are {count * head_dim} rows of "
                f"blk.0.{tensor}.weight, which has {shape[0]}."
            )
    if heads % kv_heads:
        raise ValueError(f"{path} has {HEADS} {heads}, which is no multiple of {KV_HEADS} {kv_heads}.")
    for name in (HEAD_DIM, VALUE_DIM):
        if fields.get(name, head_dim) != head_dim or head_dim % 2:
            raise ValueError(f"{path} has {name} {fields.get(name)}; it must be the even size of a head, {head_dim}.")
    if len(numbers) > fields[BLOCKS]:  # fewer are missing tensors
        raise ValueError(f"{path} has {BLOCKS} {fields[BLOCKS]} and the tensors of {len(numbers)} blocks.")
    required = (name for name in _names(fields[BLOCKS]) if name != "output.weight" or name in shapes)
    if missing := list(islice((_hugging_face(name) for name in required if name not in shapes), 4)):
        needed = 2 + len(BLOCK_TENSORS) * fields[BLOCKS]
        count = needed - len(shapes.keys() - {"output.weight", gguf_rope.TENSOR})
        raise ValueError(
            f"{path} lacks {count} tensors: {', '.join(missing)}{', ...' if count > len(missing) else ''}."
        )
    expected = {name: _shape(name, fields, head_dim, kv_heads) for name in _names(fields[BLOCKS])}
    if wrong := [name for name in expected if name in shapes and shapes[name] != expected[name]]:
        first = min(wrong, key=_hugging_face)
        raise ValueError(f"{path}: {_hugging_face(first)} is {shapes[first]}, its metadata asks for {expected[first]}.")


def _names(blocks: int) -> Iterator[str]:
    """The names of the model's tensors in a GGUF file."""
    yield from (f"{name}.weight" for name in TENSORS)
    for number in range(blocks):
        yield from (f"blk.{number}.{name}.weight" for name in BLOCK_TENSORS)


def _hugging_face(name: str) -> str:
    """`blk.0.attn_q.weight` as `model.layers.0.self_attn.q_proj.weight`."""
    if not name.startswith("blk."):
        return f"{TENSORS[name.removesuffix('.weight')]}.weight"
    _, number, part, _ = name.split(".")
    return f"model.layers.{number}.{BLOCK_TENSORS[part]}.weight"


def _shape(name: str, fields: dict[str, Any], head_dim: int, kv_heads: int) -> list[int]:
    width, hidden, vocabulary = fields[WIDTH], fields[HIDDEN], fields[VOCABULARY]
    queries, keys = fields[HEADS] * head_dim, kv_heads * head_dim
    return {
        "token_embd": [vocabulary, width],
        "output": [vocabulary, width],
        "attn_q": [queries, width],
        "attn_k": [keys, width],
        "attn_v": [keys, width],
        "attn_output": [width, queries],
        "ffn_gate": [hidden, width],
        "ffn_up": [hidden, width],
        "ffn_down": [width, hidden],
    }.get(name.split(".")[-2], [width])


def _config(path: str | os.PathLike[str], fields: dict[str, Any], reader: GGUFReader) -> LlamaConfig:
    from gguf import dequantize

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.get(gguf_rope.TENSOR)
    if factors is not None:
        factors = dequantize(factors.data, factors.tensor_type).astype(np.float32)
    return LlamaConfig(
        vocab_size=fields[VOCABULARY],
        hidden_size=fields[WIDTH],
        intermediate_size=fields[HIDDEN],
        num_hidden_layers=fields[BLOCKS],
        num_attention_heads=fields[HEADS],
        num_key_value_heads=fields.get(KV_HEADS, fields[HEADS]),
        head_dim=_head_dim(fields),
        max_position_embeddings=fields[CONTEXT],
        rms_norm_eps=fields[EPSILON],
        rope_parameters=gguf_rope.rope_parameters(path, fields, _head_dim(fields), factors),
        tie_word_embeddings="output.weight" not in tensors,
    )


def _weights(reader: GGUFReader, config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        if tensor.name == gguf_rope.TENSOR:
            continue
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).to(dtype)
        if count := heads.get(tensor.name.split(".")[-2]):  # dimension j stands beside j + D/2
            weight = weight.view(count, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        weights[_hugging_face(tensor.name)] = weight
    return weights


def _set_special_tokens(model: PreTrainedModel, fields: dict[str, Any]) -> None:
    """Where texts start and end, for generation."""
    ends = end_tokens(fields)
    for name, value in (
        ("bos_token_id", fields.get("tokenizer.ggml.bos_token_id")),
        ("eos_token_id", ends if len(ends) > 1 else next(iter(ends), None)),
        ("pad_token_id", fields.get("tokenizer.ggml.padding_token_id")),
    ):
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
