"""TRL's trainers: the gradient of each step is that of cross-entropy over each text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.interop.families import assert_near, families, flat, make, summed_loss, tokenizer

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

pytestmark = pytest.mark.slow

RATE = 0.5
TEXTS = [
    {"text": "The sea."},
    {"text": "A much longer text, of more than one window of what a model reads at once, about the sea and the wind."},
    {"text": "In 1999 there was a ship."},
    {"text": "The end of it all, so far."},
]
ANSWERS = [
    {"prompt": "The sea is", "completion": " wide."},
    {"prompt": "A much longer question about the sea and the wind:", "completion": " an answer longer than a window."},
    {"prompt": "x", "completion": " y"},
    {"prompt": "In 1999", "completion": " there was a ship."},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    plain = {"output_dir": str(folder), "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "seed": 0}
    plain |= {"disable_tqdm": True, "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant"}
    plain |= {"max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4}
    return {**plain, **changes}


def texts_of(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Ids and labels of each text of a batch: unpacked, or with its padding and its mask (LongLLaMA's windows are cut
    by columns)."""
    if "attention_mask" in batch:
        return list(zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True))
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        found += [(ids[a:b], labels[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return found


def count_targets(trainer: SFTTrainer) -> int:
    return sum(int((text[1] != -100).sum()) for batch in trainer.get_train_dataloader() for text in texts_of(batch))


def check_step(trainer: SFTTrainer, parameters: list[nn.Parameter], texts: int = 4) -> None:
    """One step of the trainer is one step down the mean loss over all targets of its texts."""
    batches = list(trainer.get_train_dataloader())
    parts = [text for batch in batches for text in texts_of(batch)]
    assert len(parts) == texts
    model = trainer.model.train()
    losses = [summed_loss(model, *part) for part in parts]
    loss = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    expected = flat(torch.autograd.grad(loss, parameters))
    before = flat(parameters)
    trainer.train()
    assert_near((before - flat(parameters)) / RATE, expected, 2e-5)
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss.item(), abs=2e-4)


def sft(model: nn.Module, folder: Path, rows: list[dict], peft_config: Any = None, **changes: Any) -> SFTTrainer:
    data = Dataset.from_list(rows)
    words = changes.pop("processing_class", tokenizer())
    return SFTTrainer(
        model,
        SFTConfig(**settings(folder, **changes)),
        train_dataset=data,
        processing_class=words,
        peft_config=peft_config,
    )


@families
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing": True, "max_length": 256, "packing_strategy": "bfd"},
        {"padding_free": True, "max_length": None},
        {"loss_type": "nll", "gradient_checkpointing": False},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
    ids=["defaults", "packing", "padding-free", "nll", "accumulation"],
)
def test_sft_takes_the_gradient_of_cross_entropy(family: str, changes: dict, tmp_path: Path) -> None:
    model = make(family)
    check_step(sft(model, tmp_path, TEXTS, **changes), list(model.parameters()))


@families
@pytest.mark.parametrize("changes", [{}, {"completion_only_loss": False}, {"padding_free": True, "max_length": None}])
def test_sft_of_answers(family: str, changes: dict, tmp_path: Path) -> None:
    model = make(family)
    trainer = sft(model, tmp_path, ANSWERS, **changes)
    answers = sum(len(row["completion"]) + 1 for row in ANSWERS)  # and an end each
    assert (count_targets(trainer) == answers) == changes.get("completion_only_loss", True)
    check_step(trainer, list(model.parameters()))


@families
def test_sft_of_what_an_assistant_says(family: str, tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in ANSWERS
    ]
    model = make(family)
    trainer = sft(model, tmp_path, rows, assistant_only_loss=True, processing_class=words)
    assert count_targets(trainer) == sum(len(row["completion"]) + 1 for row in ANSWERS)
    check_step(trainer, list(model.parameters()))


@families
def test_sft_of_an_adapter(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = sft(make(family), tmp_path, TEXTS, peft_config=config)
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(adapter) >= 2 * 12
    check_step(trainer, adapter)


@families
def test_sft_evaluates(family: str, tmp_path: Path) -> None:
    model = make(family)
    trainer = sft(model, tmp_path, TEXTS)
    parts = [summed_loss(model, *part) for part in texts_of(next(iter(trainer.get_train_dataloader())))]
    loss = sum(loss for loss, _ in parts).item() / sum(count for _, count in parts)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(loss, abs=1e-4)


@families
def test_dpo_takes_the_gradient_of_its_loss(family: str, tmp_path: Path) -> None:
    rows = [{"prompt": "The sea is", "chosen": " wide.", "rejected": " an orange cat."}]
    model, reference = make(family), make(family)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.9)
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(**settings(tmp_path, beta=0.1, per_device_train_batch_size=1)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))

    def scores(scored: nn.Module) -> torch.Tensor:
        """Log-probability of each answer."""
        logits = scored.train()(batch["input_ids"], batch["attention_mask"], use_cache=False).logits[:, :-1]
        said = -F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")
        return (said * batch["completion_mask"][:, 1:]).sum(1)

    better, worse = scores(model) - scores(reference).detach()
    loss = -F.logsigmoid(0.1 * (better - worse))
    expected = flat(torch.autograd.grad(loss, list(model.parameters())))
    before = flat(model.parameters())
    trainer.train()
    assert_near((before - flat(model.parameters())) / RATE, expected, 1e-4)
