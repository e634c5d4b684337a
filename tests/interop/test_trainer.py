"""transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tests.interop.families import assert_near, draw_ids, families, flat, make, summed_loss

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

RATE = 0.5
TARGETS = (2, 44, 4, 16)  # of four rows


def rows() -> list[dict[str, torch.Tensor]]:
    """Four texts of 48 tokens with very different numbers of targets."""
    found = []
    for ids, learned in zip(draw_ids(4, 48), TARGETS, strict=True):
        labels = ids.clone()
        labels[: 48 - learned] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    plain = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "optim": "sgd", "learning_rate": RATE}
    plain |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(str(folder), **{**plain, **changes})


def one_step(model: nn.Module, folder: Path, data: Any = None, **changes: Any) -> tuple[torch.Tensor, float]:
    """The gradient that one step of Trainer took, and the loss that it logged."""
    collator = changes.pop("data_collator", None)
    before = flat(model.parameters())
    trainer = Trainer(
        model, arguments(folder, max_steps=1, **changes), train_dataset=data or rows(), data_collator=collator
    )
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return (before - flat(model.parameters())) / RATE, logged


def true_gradient(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
    """Of the mean loss over all targets, each row alone."""
    model.train()
    parts = [summed_loss(model, row["input_ids"], row["labels"]) for row in data]
    loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
    loss.backward()
    gradient = flat(p.grad for p in model.parameters())
    model.zero_grad()
    return gradient, loss.item()


@families
@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_accumulated_batches_are_one_large_batch(family: str, accumulated: int, tmp_path: Path) -> None:
    expected, loss = true_gradient(make(family), rows())
    sizes = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    found, logged = one_step(make(family), tmp_path, **sizes)
    assert_near(found, expected)
    assert logged == pytest.approx(loss, abs=2e-4)


@families
@pytest.mark.parametrize("kwargs", [None, {}, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_no_gradient(family: str, kwargs: dict | None, tmp_path: Path) -> None:
    expected, _ = true_gradient(make(family), rows())
    found, _ = one_step(
        make(family),
        tmp_path,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
    )
    assert_near(found, expected)


@families
def test_packed_rows_are_the_rows_alone(family: str, tmp_path: Path) -> None:
    """DataCollatorWithFlattening: position_ids begin anew with each row."""
    expected, loss = true_gradient(make(family), rows())
    found, logged = one_step(
        make(family), tmp_path, per_device_train_batch_size=4, data_collator=DataCollatorWithFlattening()
    )
    assert_near(found, expected)
    assert logged == pytest.approx(loss, abs=2e-4)


@families
def test_label_smoothing_is_of_the_next_token(family: str, tmp_path: Path) -> None:
    model, data = make(family).train(), rows()
    ids, labels = (torch.stack([row[name] for row in data]) for name in ("input_ids", "labels"))
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    loss = F.cross_entropy(logits, wanted, label_smoothing=0.2)
    loss.backward()
    expected = flat(p.grad for p in model.parameters())
    model.zero_grad()
    found, logged = one_step(model, tmp_path, per_device_train_batch_size=4, label_smoothing_factor=0.2)
    assert logged == pytest.approx(loss.item(), abs=2e-4)
    assert_near(found, expected)


@families
def test_predictions_are_the_models_logits(family: str, tmp_path: Path) -> None:
    model, data = make(family), rows()
    expected = torch.stack([model(row["input_ids"][None], use_cache=False).logits[0] for row in data]).detach()
    trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=2))
    result = trainer.predict(data)
    np.testing.assert_allclose(result.predictions, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(result.label_ids, torch.stack([row["labels"] for row in data]))
    without_labels = trainer.predict([{"input_ids": row["input_ids"]} for row in data])
    np.testing.assert_allclose(without_labels.predictions, expected, rtol=1e-4, atol=1e-4)


@families
def test_metrics_see_the_models_predictions(family: str, tmp_path: Path) -> None:
    model, data = make(family), rows()
    seen: dict[str, Any] = {}

    def accuracy(prediction: Any) -> dict[str, float]:
        seen["predictions"] = prediction.predictions
        counted = prediction.label_ids[:, 1:] != -100
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(right[counted].mean())}

    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=data,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate()
    ids, labels = (torch.stack([row[name] for row in data]) for name in ("input_ids", "labels"))
    predicted = model(ids, use_cache=False).logits.argmax(-1)
    np.testing.assert_array_equal(seen["predictions"], predicted)
    counted = labels[:, 1:] != -100
    right = (predicted[:, :-1] == labels[:, 1:])[counted].float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(right)
    assert metrics["eval_loss"] == pytest.approx(true_gradient(model, data)[1], abs=1e-4)


@families
def test_a_resumed_run_ends_as_one_that_was_not_broken_off(family: str, tmp_path: Path) -> None:
    def train(steps: int, resume: str | None) -> torch.Tensor:
        settings = arguments(
            tmp_path, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2
        )
        trainer = Trainer(make(family), settings, train_dataset=rows() * 4)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == steps
        return flat(trainer.model.parameters())

    whole = train(4, None)
    assert torch.equal(train(4, str(tmp_path / "checkpoint-2")), whole)
    loaded = type(make(family)).from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(flat(loaded.parameters()), whole)


@families
def test_the_best_checkpoint_is_loaded_at_the_end(family: str, tmp_path: Path) -> None:
    often = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings = arguments(tmp_path, max_steps=3, learning_rate=30.0, load_best_model_at_end=True, **often)  # it diverges
    trainer = Trainer(make(family), settings, train_dataset=rows() * 8, eval_dataset=rows())
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(set(losses.values())) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()))
