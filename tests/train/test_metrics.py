"""metrics.jsonl holds each step once, however often a run was stopped."""

from __future__ import annotations

import builtins
import json

import pytest

from oncelm.train.metrics import Metrics
from oncelm.train.reports import open_reports


def steps(out) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def write(out, start_step: int, last_step: int) -> None:
    metrics = Metrics(out, start_step, open_reports(("tensorboard",), out, start_step, {}))
    for step in range(start_step + 1, last_step + 1):
        metrics.advance(1.0, planned_steps=10)
        metrics.log(step, {"loss": 1.0, "tokens_per_second": 5.0})
    metrics.close()


def test_a_resumed_run_takes_back_later_lines_and_half_lines(tmp_path) -> None:
    write(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write(tmp_path, 3, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_half_line_of_an_earlier_step_is_dropped_too(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    write(tmp_path, 3, 4)
    assert steps(tmp_path) == [1, 4]


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"\xff\n", b"{\n"])
def test_a_line_that_a_power_cut_garbled_is_dropped(tmp_path, damage: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n' + damage)
    write(tmp_path, 3, 4)
    assert steps(tmp_path) == [1, 4]


def test_a_new_run_starts_a_new_file(tmp_path) -> None:
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 2)
    assert steps(tmp_path) == [1, 2]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_without_tensorboard_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog) -> None:
    real_import = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    write(tmp_path, 0, 1)
    assert steps(tmp_path) == [1]
    assert "tensorboard is not installed" in caplog.text
    assert not (tmp_path / "tensorboard").exists()
