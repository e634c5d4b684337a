"""The models that each tool is tried with: transformers' own Llama, which says what is right, and ours beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from oncelm import LongLlamaConfig, LongLlamaForCausalLM, YocoConfig, YocoForCausalLM, load_tokenizer

VOCAB = 260  # of the bytes tokenizer
WINDOW = 32  # of the LongLLaMA: texts of these tests are of several windows where nothing else is said

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
MARKS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
LLAMA = {**SIZES, **MARKS, "num_hidden_layers": 2, "num_key_value_heads": 2}
YOCO = {**SIZES, **MARKS, "num_self_decoder_layers": 1, "num_cross_decoder_layers": 1, "num_key_value_heads": 2}

FAMILIES = ["llama", "retention", "window", "longllama"]
families = pytest.mark.parametrize("family", FAMILIES)
close = {"rtol": 1e-4, "atol": 1e-5}


def make(family: str, **changes: Any) -> PreTrainedModel:
    """A small model in evaluation mode, the same at each call; weights large enough that every part shows."""
    torch.manual_seed(0)
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
    elif family == "longllama":
        windows = {"max_position_embeddings": WINDOW, "last_context_length": 16}
        memory = {"mem_layers": [1], "mem_dtype": "float32"}
        model = LongLlamaForCausalLM(LongLlamaConfig(**{**LLAMA, **windows, **memory, **changes}))
    else:
        kind = {"self_decoder": "gated_retention" if family == "retention" else "sliding_window", "window_size": 16}
        model = YocoForCausalLM(YocoConfig(**{**YOCO, **kind, "num_self_heads": 2, **changes}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_one_window(family: str) -> PreTrainedModel:
    """Where a LongLLaMA cuts windows depends on padding and on how a text came in pieces; one window has no cuts."""
    longest = {"max_position_embeddings": 512, "last_context_length": 512}
    return make(family, **(longest if family == "longllama" else {}))


def draw_ids(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def summed_loss(
    model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    """Cross-entropy of one sequence [T] from the model's own logits, and the number of targets."""
    logits = model(input_ids=ids[None], attention_mask=None if mask is None else mask[None], use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], labels[1:], reduction="sum"), int((labels[1:] != -100).sum())


def tokenizer() -> PreTrainedTokenizerBase:
    """Each byte is a token, and so is `</s>` in a text, which TRL writes at the end of each."""
    words = load_tokenizer("bytes")
    words.split_special_tokens = False
    return words


def flat(tensors: Any) -> torch.Tensor:
    """All numbers of tensors in one vector."""
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def assert_near(found: torch.Tensor, expected: torch.Tensor, most: float = 1e-5) -> None:
    """The difference of two vectors is at most `most` of the expected one's length."""
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < most
