"""The thread that writes checkpoints works on its rank's own GPU."""

from __future__ import annotations

import pytest
import torch

from oncelm.train.parallel.ranks import Ranks
from oncelm.train.saving import Saver


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_thread_chooses_the_gpu_of_its_rank(tmp_path, monkeypatch, device: str, chosen: list[str]) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    Saver(tmp_path, 1, Ranks(torch.device(device)))._thread.submit(int).result()
    assert seen == chosen
