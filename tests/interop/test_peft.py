"""PEFT's adapters: what is trained is what is computed, and all of it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from tests.interop.families import assert_near, close, draw_ids, families, flat, make, make_one_window

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

HEAD = {"llama": "lm_head", "longllama": "lm_head", "retention": "output_projection", "window": "output_projection"}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def on_every_linear(family: str, **changes: Any) -> Any:
    """A model with an adapter on every linear layer, the head too, as if it had been trained."""
    model = make(family)
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 16, "target_modules": linear_layers(model), "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **{**options, **changes}))


def own_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@families
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True, "lora_dropout": 0.0}])
def test_the_loss_is_of_the_adapted_model(family: str, changes: dict) -> None:
    model, ids = on_every_linear(family, **changes), draw_ids(2, 48)
    with model.disable_adapter():
        plain = model(input_ids=ids, labels=ids).loss
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = model(input_ids=ids, labels=ids).loss
    expected = own_loss(model(input_ids=ids, use_cache=False).logits, ids)
    torch.testing.assert_close(found, expected, **close)
    assert abs(found - plain) > 0.1
    for mode in (model.train, model.eval):
        mode()
        gradients = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(trainable.values()))
        wanted = torch.autograd.grad(
            own_loss(model(input_ids=ids, use_cache=False).logits, ids), list(trainable.values())
        )
        assert_near(flat(gradients), flat(wanted))
        assert [name for name, g in zip(trainable, gradients, strict=True) if not g.any()] == []


@families
def test_an_adapter_on_the_head_alone(family: str) -> None:
    model, ids = on_every_linear(family, target_modules=[HEAD[family]]), draw_ids(2, 48)
    found = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(found, own_loss(model(input_ids=ids, use_cache=False).logits, ids), **close)
    found.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@families
@pytest.mark.parametrize("name", ["head", "embeddings"])
def test_modules_to_save_are_trained_and_kept(family: str, name: str, tmp_path: Path) -> None:
    module = HEAD[family] if name == "head" else "embed_tokens"
    first = linear_layers(make(family))[0]
    model, ids = on_every_linear(family, target_modules=[first], modules_to_save=[module]), draw_ids(2, 48)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    after = model(input_ids=ids, labels=ids)
    assert after.loss < loss - 0.01
    torch.testing.assert_close(after.loss, own_loss(model(input_ids=ids, use_cache=False).logits, ids), **close)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(family), tmp_path)
    torch.testing.assert_close(
        again(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
    )


@families
def test_all_linear_means_all_but_the_head(family: str) -> None:
    model = on_every_linear(family, target_modules="all-linear")
    expected = [name for name in linear_layers(make(family)) if name != HEAD[family]]
    adapted = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == expected


@families
def test_generate_runs_the_adapted_model_as_merging_does(family: str) -> None:
    model, ids = on_every_linear(family), draw_ids(1, 20)
    plain = make(family)
    logits = model(input_ids=ids, use_cache=False).logits
    tokens = model.generate(input_ids=ids, **GREEDY)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), plain.generate(ids, **GREEDY))
    assert not torch.equal(tokens, plain.generate(ids, **GREEDY))
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    torch.testing.assert_close(merged(ids, use_cache=False).logits, logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(merged.generate(ids, **GREEDY), tokens)


@families
def test_adapters_are_switched_in_the_middle_of_a_text(family: str, tmp_path: Path) -> None:
    model, ids = on_every_linear(family), draw_ids(1, 20)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(family), tmp_path, adapter_name="first")
    expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, expected)
    again.add_adapter("second", again.peft_config["first"])
    for name, p in again.named_parameters():
        if ".second." in name:
            nn.init.normal_(p, std=0.1)
    again.set_adapter("second")
    second = again(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(second, expected, atol=0.1)
    again.set_adapter("first")
    torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, expected)


@families
def test_adapters_of_transformers_itself(family: str, tmp_path: Path) -> None:
    """model.add_adapter, without PEFT's wrapper."""
    model, ids = make(family), draw_ids(2, 48)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=linear_layers(model), init_lora_weights=False))
    found = model(ids, labels=ids).loss
    torch.testing.assert_close(found, own_loss(model(ids, use_cache=False).logits, ids), **close)
    model.save_pretrained(tmp_path / "adapter")
    again = make(family)
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@families
def test_trainer_trains_adapters_over_accumulated_batches(family: str, tmp_path: Path) -> None:
    ids = draw_ids(4, 48)
    rows = []
    for row, learned in zip(ids, (2, 44, 4, 16), strict=True):
        labels = row.clone()
        labels[: 48 - learned] = -100
        rows.append({"input_ids": row, "labels": labels})
    steps = []
    for size in (4, 1):
        model = on_every_linear(family)
        before = flat(p for p in model.parameters() if p.requires_grad)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, optim="sgd", learning_rate=0.5,
            lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", gradient_checkpointing=size == 1,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        steps.append(flat(p for p in model.parameters() if p.requires_grad) - before)
    assert_near(*steps)


@families
def test_checkpointing_as_prepared_for_few_bits(family: str) -> None:
    """prepare_model_for_kbit_training passes {} as the options of checkpointing."""
    ids, gradients = draw_ids(2, 80), []
    for prepared in (False, True):
        model = make(family)
        if prepared:
            model.is_loaded_in_4bit = True  # the preparation is of such models; what it does needs no four bits
            model = peft.prepare_model_for_kbit_training(model)
            assert not any(p.requires_grad for p in model.parameters())
            assert model.is_gradient_checkpointing
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=linear_layers(model), init_lora_weights=False)
        model = peft.get_peft_model(model, config).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(flat(p.grad for name, p in model.named_parameters() if "lora" in name))
    assert_near(gradients[1], gradients[0])


@families
@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_virtual_tokens(family: str, kind: str, tmp_path: Path) -> None:
    """They stand before the text in all it does: loss, a step of training, generate."""
    model, ids = make_one_window(family), draw_ids(2, 24)
    if kind == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    else:
        config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=32)
    tuned = peft.get_peft_model(model, config)
    mask = torch.ones_like(ids)

    def with_prompt(text: torch.Tensor) -> torch.Tensor:
        """Logits of the text behind the virtual tokens, and before it those of its first token, by embeddings."""
        embeddings = torch.cat((tuned.get_prompt(len(text)), model.get_input_embeddings()(text)), 1)
        return model(inputs_embeds=embeddings, use_cache=False).logits[:, 4:]

    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=ids, attention_mask=mask, labels=ids).loss
        torch.testing.assert_close(loss, F.cross_entropy(with_prompt(ids)[:, :-1].mT, ids), **close)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    tuned.eval()
    for options in ({}, {"use_cache": False}):
        text = ids
        for _ in range(8):
            text = torch.cat((text, with_prompt(text)[:, -1:].argmax(-1)), 1)
        found = tuned.generate(input_ids=ids, attention_mask=mask, **options, **GREEDY)
        assert torch.equal(found, text)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_one_window(family), tmp_path).eval()
    assert torch.equal(again.generate(input_ids=ids, attention_mask=mask, **GREEDY), text)


@families
def test_prefix_tuning_runs_or_is_refused_by_name(family: str) -> None:
    """It learns keys and values of every layer, which retention and memory do not have."""
    model, ids = make(family), draw_ids(2, 24)
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    if family == "llama":
        assert tuned(input_ids=ids, labels=ids).loss.requires_grad
        return
    with pytest.raises(ValueError, match=r"got DynamicCache.*use prompt tuning, p-tuning or LoRA"):
        tuned(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="use prompt tuning, p-tuning or LoRA"):
        tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)


@families
@pytest.mark.parametrize("what", ["texts", "tokens"])
def test_a_classifier_is_trained_with_its_new_head(family: str, what: str, tmp_path: Path) -> None:
    make(family).save_pretrained(tmp_path / "model")
    auto = AutoModelForSequenceClassification if what == "texts" else AutoModelForTokenClassification
    ids = draw_ids(4, 24)
    rows = [{"input_ids": row, "labels": row[0] % 2 if what == "texts" else row % 2} for row in ids]
    layers = [name for name in linear_layers(make(family)) if name != HEAD[family]]
    config = peft.LoraConfig(task_type="SEQ_CLS" if what == "texts" else "TOKEN_CLS", target_modules=layers)
    torch.manual_seed(1)
    model = peft.get_peft_model(auto.from_pretrained(tmp_path / "model", num_labels=2), config)
    head = flat(model.base_model.model.score.modules_to_save.default.parameters()).clone()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no", logging_steps=3,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(flat(model.base_model.model.score.modules_to_save.default.parameters()), head)
    found = trainer.predict(rows)
    assert found.predictions.shape == ((4, 2) if what == "texts" else (4, 24, 2))
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    again = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "model", num_labels=2), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
