"""The tensors of a GGUF file as the weights of a transformers LLaMA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from oncelm.models.gguf.header import Header, Tensor

ROPE_FACTORS = "rope_freqs.weight"
BLOCK_NAMES = {
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


def unpack(data: memoryview, name: str, tensor: Tensor) -> np.ndarray:
    """A tensor's numbers in float32, in its shape, the quantisation undone."""
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.kind)
    packed = np.frombuffer(data, np.uint8, tensor.size, tensor.start).reshape(*tensor.shape[:-1], -1)
    try:
        return dequantize(packed, kind).reshape(tensor.shape)
    except NotImplementedError as error:
        raise ValueError(f"tensor {name} is packed as {kind.name}, which the package gguf cannot unpack") from error


def check_tensors(path: Path, header: Header, config: LlamaConfig) -> None:
    """Refuse tensors that are missing, of another shape than the metadata ask for, or that no LLaMA has."""
    asked = _shapes(config)
    found = {name: tensor.shape for name, tensor in header.tensors.items() if name != ROPE_FACTORS}
    missing = [name for name in asked if name not in found and not name.endswith(".bias")]
    if missing:
        raise ValueError(f"{path} lacks {_some(missing)}.")
    if left := [name for name in found if name not in asked]:
        raise ValueError(f"{path} has {_some(left)}: no part of the LLaMA that it would become.")
    for name, shape in found.items():
        if shape != asked[name]:
            raise ValueError(f"{path}: {name} is {list(shape)}, its metadata asks for {list(asked[name])}.")


def read_weights(header: Header, config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights by transformers' names. Biases that the file leaves out are zeros."""
    weights = {}
    for name, shape in _shapes(config).items():
        if name not in header.tensors:
            weights[_name(name)] = torch.zeros(shape, dtype=dtype)
            continue
        values = unpack(memoryview(header.data), name, header.tensors[name])
        if ".attn_q." in name:
            values = _halves(values, config.num_attention_heads)
        elif ".attn_k." in name:
            values = _halves(values, config.num_key_value_heads)
        weights[_name(name)] = torch.from_numpy(np.array(values)).to(dtype)  # a copy: the file is read-only
    return weights


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of such a model by the file's names, with their shapes."""
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    block: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (width,),
        "attn_q.weight": (query, width),
        "attn_k.weight": (key, width),
        "attn_v.weight": (key, width),
        "attn_output.weight": (width, query),
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (inner, width),
        "ffn_down.weight": (width, inner),
    }
    if config.attention_bias:
        block |= {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,), "attn_output.bias": (width,)}
    if config.mlp_bias:
        block |= {"ffn_gate.bias": (inner,), "ffn_up.bias": (inner,), "ffn_down.bias": (width,)}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, width),
        "output_norm.weight": (width,),
        **{f"blk.{index}.{name}": shape for index in range(config.num_hidden_layers) for name, shape in block.items()},
    }
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (vocabulary, width)
    return shapes


def _name(name: str) -> str:
    """transformers' name of a tensor."""
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    *place, part, kind = name.split(".")
    if not place:
        return f"{outside[part]}.{kind}"
    return f"model.layers.{place[1]}.{BLOCK_NAMES[part]}.{kind}"


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k, dimension j beside j + D/2 as files have them, in transformers' order: 0, 1, ... of each half."""
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
