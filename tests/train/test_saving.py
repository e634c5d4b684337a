"""The thread that writes checkpoints: on its rank's own GPU, gone when it is done, honest about what failed."""

from __future__ import annotations

import errno
import threading
import time

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from oncelm.train.checkpoint import find_checkpoint
from oncelm.train.parallel.mesh import Mesh
from oncelm.train.saving import MODEL, Saver


class Stager:
    """Of tensors that stay where they are."""

    def __init__(self, **options: bool) -> None:
        pass

    def stage(self, tensors: dict) -> dict:
        return tensors


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_thread_chooses_the_gpu_of_its_rank(tmp_path, monkeypatch, device: str, chosen: list[str]) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    mesh = Mesh(torch.device(device))
    monkeypatch.setattr("oncelm.train.saving.BlockingAsyncStager", Stager)
    saver = Saver(tmp_path, 1, mesh)
    saver.save(1, {}, lambda folder: None)
    saver.wait()
    assert seen == chosen


def test_no_thread_is_left_behind(tmp_path) -> None:
    saver = Saver(tmp_path, 1, Mesh(torch.device("cpu")))
    for step in (1, 2):
        saver.save(step, {MODEL: {"x": torch.zeros(2)}}, lambda folder: None)
    saver.wait()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("checkpoint") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
    assert find_checkpoint(tmp_path).name == "step-000002"


@pytest.mark.parametrize("cause", [RuntimeError("Gloo: Connection closed by peer"), OSError(errno.ENOSPC, "No space")])
def test_only_a_failed_write_is_told_as_one(tmp_path, monkeypatch, cause: Exception) -> None:
    def fail(self, plan, planner):
        raise cause

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", fail)
    saver = Saver(tmp_path, 1, Mesh(torch.device("cpu")))
    saver.save(1, {MODEL: {"x": torch.zeros(2)}}, lambda folder: None)
    told = "cannot write .*step-000001" if isinstance(cause, OSError) else "^Gloo: Connection closed"
    with pytest.raises(type(cause), match=told):
        saver.wait()
    assert list(tmp_path.iterdir()) == []
