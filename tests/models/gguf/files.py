"""Small GGUF files of transformers' LLaMA, with the keys and tensors that llama.cpp's converter writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oncelm

gguf = pytest.importorskip("gguf", reason="needs `pip install gguf`")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Write = Callable[[Any], None]  # adds to a GGUFWriter


def make_llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 262,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | settings))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model, length: int = 57) -> torch.Tensor:
    with torch.no_grad():
        return model(3 + torch.arange(length)[None] * 7 % 250, use_cache=False).logits


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp orders them: dimension j beside dimension j + D/2."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def bytes_tokenizer(writer) -> None:
    """The keys of a byte-level tokenizer of 262 tokens with SmolLM's cut."""
    tokenizer = oncelm.load_tokenizer("bytes")
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__), "Hi", "He"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["H i", "H e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def llama3_factors(model: LlamaForCausalLM) -> np.ndarray:
    """The tensor rope_freqs.weight as the converter computes it from a configuration with Llama 3's RoPE."""
    config, rope = model.config, model.config.rope_parameters
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    factors = []
    for frequency in 1.0 / rope["rope_theta"] ** exponents:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            factors.append(1)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32).numpy()


def write(
    model: LlamaForCausalLM,
    file: Path,
    architecture: str = "llama",
    quantisation: str | None = None,
    tokenizer: Write = bytes_tokenizer,
    more: Write = lambda writer: None,
    without: tuple[str, ...] = (),
    **metadata: int | None,
) -> None:
    """A GGUF file of the model.

    Args:
        model: a LLaMA.
        file: to write.
        architecture: named in it.
        quantisation: of the matrices; None means float32.
        tokenizer: adds the tokenizer's keys.
        more: adds other keys and tensors.
        without: parts of names of tensors that are left out.
        metadata: numbers that are changed, or left out where None.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "rope_dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for name, size in (sizes | metadata).items():
        if size is not None:
            getattr(writer, f"add_{name}")(size)
    tokenizer(writer)
    for name, tensor in model.state_dict().items():
        part, kind = name.rsplit(".", 1)
        place, short = "", part
        if "layers" in name:
            index, short = part.split(".", 3)[2:]
            place = f"blk.{index}."
        array = tensor.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                array = interleaved(array, heads)
        target = f"{place}{NAMES[short]}.{kind}"
        if any(left in target for left in without) or (short == "lm_head" and config.tie_word_embeddings):
            continue
        if quantisation and array.ndim == 2:
            kind_of = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(target, gguf.quants.quantize(array, kind_of), raw_dtype=kind_of)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
