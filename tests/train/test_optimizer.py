"""Which parameters which optimizer updates, and that both go through checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.optim import AdamW, Muon

from oncelm.train.optimizer import build_optimizers
from oncelm.train.trainer import Trainer
from tests.train.parallel.cases import train
from tests.train.ranks import run_ranks


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_once_and_no_decay_of_embeddings_and_norms(make_model, make_config, tied, optimizer) -> None:
    model = make_model(tie_word_embeddings=tied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    updated, kept, orthogonal = [], set(), set()
    for part in build_optimizers(model, make_config(optimizer=optimizer)):
        for group in part.param_groups:
            group_names = [names[id(parameter)] for parameter in group["params"]]
            updated += group_names
            if group["weight_decay"] == 0:
                kept.update(group_names)
            if isinstance(part, Muon):
                orthogonal.update(group_names)
    assert sorted(updated) == sorted(names.values())
    assert kept == {name for name in updated if "norm" in name or "embed" in name}
    assert orthogonal == (set() if optimizer == "adamw" else {name for name in updated if "_proj" in name})


def test_nothing_to_train_is_an_error(make_model, make_config) -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizers(make_model().requires_grad_(False), make_config())


def losses(out: str) -> list[float]:
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_muon_learns_and_resumes_bitwise(make_model, dataset, make_config, tmp_path) -> None:
    options = {"optimizer": "muon", "schedule": "constant", "weight_decay": 0.01}
    whole = make_config(out=str(tmp_path / "whole"), steps=20, **options)
    trainer = Trainer(make_model(), dataset, whole)
    trainer.train()
    assert [type(part) for part in trainer.optimizers] == [Muon, AdamW]
    assert losses(whole.out)[-1] < 0.8 * losses(whole.out)[0]
    Trainer(make_model(), dataset, make_config(steps=8, **options)).train()
    parts = make_config(steps=20, resume=True, **options)
    Trainer(make_model(), dataset, parts).train()
    assert losses(parts.out) == losses(whole.out)


@pytest.mark.parametrize(
    "split",
    [
        {},
        pytest.param({"context_parallel": 2}, marks=pytest.mark.slow),
        pytest.param({"tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_muon_on_two_ranks_has_the_losses_of_one(tmp_path, split: dict) -> None:
    options = {
        **{"data": "unused", "seq_len": 16, "batch_size": 4, "steps": 6, "warmup_steps": 2, "lr": 1e-2},
        **{"log_every": 1, "save_every": 2, "eval_every": None, "optimizer": "muon"},
    }
    one, two = (options | {"out": str(tmp_path / name)} for name in ("one", "two"))
    shape = {"num_self_decoder_layers": 1, "num_cross_decoder_layers": 1}
    assert run_ranks(1, train, one, shape) == ["ended at 6"]
    assert run_ranks(2, train, two | split | {"steps": 3}, shape) == ["ended at 3"] * 2
    assert run_ranks(2, train, two | split | {"resume": True}, shape) == ["ended at 6"] * 2
    # rounded to bfloat16 inside of Muon
    assert losses(two["out"]) == pytest.approx(losses(one["out"]), rel=5e-3)
