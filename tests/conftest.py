"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tensors in tests are tiny: many threads, on top of pytest-xdist's processes, only wait for each other."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture
def golden() -> Path:
    """The folder of the official implementations' recorded outputs; skips the test where it is not there."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no recorded outputs of the official code at {GOLDEN}")
    return GOLDEN


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that an element that nobody wrote shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
