"""Weights & Biases without its servers: a module in its place."""

from __future__ import annotations

import sys
import types

import pytest

from oncelm.train.reports import open_reports
from oncelm.train.trainer import Trainer


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **options) -> FakeWandb:
        self.started.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_every_value_and_a_resumed_run_goes_on(make_model, dataset, make_config, monkeypatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Trainer(make_model(), dataset, make_config(report=["wandb"], steps=2)).train()
    Trainer(make_model(), dataset, make_config(report=["wandb"], steps=3, resume=True)).train()
    assert [step for step, values in wandb.logged if "loss" in values] == [1, 2, 3]
    assert any("validation_loss" in values for _, values in wandb.logged)
    assert wandb.finished == 2
    first, second = wandb.started
    assert first["project"] == "oncelm"
    assert first["name"] == "run"
    assert first["config"]["lr"] == 1e-2
    assert first["id"] == second["id"]


def test_a_new_run_in_the_same_folder_is_another_one(tmp_path, monkeypatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start_step in (0, 0, 5):
        open_reports(("wandb",), tmp_path, start_step, {})
    first, second, third = (options["id"] for options in wandb.started)
    assert first != second == third


def test_wandb_that_is_not_installed_is_an_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'oncelm\[wandb\]'"):
        open_reports(("wandb",), tmp_path, 0, {})


def test_an_unknown_report_is_an_error(make_config) -> None:
    with pytest.raises(ValueError, match="unknown report\\[0\\] 'tensorbord'; did you mean 'tensorboard'"):
        make_config(report=["tensorbord"])
    with pytest.raises(ValueError, match="report must be a list"):
        make_config(report="wandb")
