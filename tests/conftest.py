"""Fixtures shared by all tests; torch is imported in them, as pytest-xdist's first process needs none."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

gc.disable()  # until all tests are imported, see pytest_collection_finish
GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def pytest_collection_finish() -> None:
    """The million objects of imported modules stay: they are not looked at again whenever garbage is collected."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tensors in tests are tiny: many threads, on top of pytest-xdist's processes, only wait for each other."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """A test that draws from torch's own generator draws the same numbers in every run and order."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def golden() -> Path:
    """The folder of the official implementations' recorded outputs; skips the test where it is not there."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no recorded outputs of the official code at {GOLDEN}")
    return GOLDEN


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, or of integers a number that is no index, no count and no token of a test."""
    import torch

    if tensor.device.type == "meta":
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        value: float = float("nan")
    else:
        value = 1 if tensor.dtype == torch.bool else min(torch.iinfo(tensor.dtype).max, 1 << 62) - 5
    tensor.detach().fill_(value)
    return tensor


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds what no computation survives, so that an element that nobody wrote shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: _poison(make(*args, **kwargs))

    import torch

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def exact_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.7) truncates to bfloat16, and rounds 7.9 to 4 in float8: torch rounds in its place."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import torch
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
