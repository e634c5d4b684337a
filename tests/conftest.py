"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tensors in tests are tiny: many threads, on top of pytest-xdist's processes, only wait for each other."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """A test that draws from torch's own generator draws the same numbers in every run and order."""
    torch.manual_seed(0)


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


@pytest.fixture
def exact_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.7) truncates to bfloat16, and rounds 7.9 to 4 in float8: torch rounds in its place."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    narrow = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target not in narrow:
            return convert(data, source, target, mode)
        dtype, bits = narrow[target]
        return torch.tensor(data).to(dtype).view(bits).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
