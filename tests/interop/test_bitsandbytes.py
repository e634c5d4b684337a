"""Weights in 4 and 8 bits by bitsandbytes, on the CPU, and adapters trained over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import oncelm
from tests.interop.families import assert_near, close, draw_ids, families, flat, make

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:MatMul8bitLt")]

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[
    str, tuple[dict[str, Any], str, float]
] = {  # options, kind of layers, error of the logits that they may make
    "4": (FOUR, "Linear4bit", 0.35),
    "4-double": ({**FOUR, "bnb_4bit_use_double_quant": True}, "Linear4bit", 0.35),
    "8": ({"load_in_8bit": True}, "Linear8bitLt", 0.05),
}


def quantised(model: nn.Module, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


def count(model: nn.Module, kind: str) -> int:
    return sum(type(module).__name__ == kind for module in model.modules())


@families
@pytest.mark.parametrize("bits", KINDS)
@torch.no_grad()
def test_every_layer_but_the_head_has_few_bits(family: str, bits: str, tmp_path: Path) -> None:
    options, kind, most = KINDS[bits]
    plain, ids = make(family), draw_ids(2, 48)
    model = quantised(plain, tmp_path / "plain", **options)
    assert count(model, kind) == sum(isinstance(module, nn.Linear) for module in plain.modules()) - 1
    assert model.get_memory_footprint() < 0.6 * plain.get_memory_footprint()
    logits = model(ids, use_cache=False).logits
    assert_near(logits.flatten(), plain(ids, use_cache=False).logits.flatten(), most)
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].mT, ids[:, 1:]), **close)
    text = ids[:1, :8]  # a LongLLaMA reads it in one window, with a cache or without
    tokens = model.generate(text, attention_mask=torch.ones_like(text), **GREEDY)
    assert tokens.shape == (1, 16)
    expected = model.generate(text, attention_mask=torch.ones_like(text), use_cache=False, **GREEDY)
    if kind == "Linear4bit":  # 8 bits round a row of activations by its largest, and large ones by their column's
        assert torch.equal(tokens, expected)

    model.save_pretrained(tmp_path / "few")
    for load in (AutoModelForCausalLM.from_pretrained, oncelm.load):
        again = load(tmp_path / "few")
        assert count(again, kind) == count(model, kind)
        assert torch.equal(again(ids, use_cache=False).logits, logits)


@families
def test_the_loss_of_a_head_in_few_bits(family: str, tmp_path: Path) -> None:
    model, ids = quantised(make(family), tmp_path, **FOUR, llm_int8_skip_modules=["nothing"]), draw_ids(2, 48)
    assert type(model.get_output_embeddings()).__name__ == "Linear4bit"
    found = model(ids, labels=ids)
    torch.testing.assert_close(found.loss, F.cross_entropy(found.logits[:, :-1].mT, ids[:, 1:]), **close)


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_over_four_bits(family: str, checkpointing: bool, tmp_path: Path) -> None:
    model, ids = quantised(make(family), tmp_path, **FOUR), draw_ids(2, 48)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    adapter = [p for p in model.parameters() if p.requires_grad]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in adapter]
    model.gradient_checkpointing_disable()
    logits = model(input_ids=ids, use_cache=False).logits
    expected = torch.autograd.grad(F.cross_entropy(logits[:, :-1].mT, ids[:, 1:]), adapter)
    assert_near(flat(gradients), flat(expected))
    assert all(gradient.any() for gradient in gradients)
    with torch.no_grad():
        for p, gradient in zip(adapter, gradients, strict=True):
            p.sub_(0.1 * gradient)
        assert model(input_ids=ids, labels=ids).loss < loss - 0.01
    model.eval()
    text = ids[:1, :8]  # a LongLLaMA reads it in one window, with a cache or without
    found = [model.generate(input_ids=text, use_cache=use_cache, **GREEDY) for use_cache in (True, False)]
    assert torch.equal(*found)
