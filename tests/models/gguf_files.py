"""GGUF files of small LLaMA models, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oncelm

gguf = pytest.importorskip("gguf", reason="needs `pip install gguf`")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 262,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp orders them: dimension j beside dimension j + D/2."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def add_byte_tokenizer(writer: gguf.GGUFWriter) -> None:
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


def write(
    model: LlamaForCausalLM,
    file: Path,
    architecture: str = "llama",
    quantisation: str | None = None,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    **metadata: int | None,
) -> None:
    """A GGUF file of the model, with these numbers of its metadata changed, or left out where None.

    `more` and `tokenizer` add to it; by default the tokenizer is one of bytes.
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
    }
    for name, size in (sizes | metadata).items():
        if size is not None:
            getattr(writer, f"add_{name}")(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    (tokenizer or add_byte_tokenizer)(writer)
    more(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        short = name.split(".", 3)[3] if "layers" in name else name
        array = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                array = interleaved(array, heads)
        target = f"blk.{name.split('.')[2]}.{NAMES[short]}" if "layers" in name else NAMES[name]
        if quantisation and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 60)[None], use_cache=False).logits
