"""Devices and dtypes by name."""

from __future__ import annotations

import pytest
import torch

from oncelm.utils.device import resolve_device, resolve_dtype


def test_known_names() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device(None).type in ("cpu", "cuda")
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_dtype(torch.float16) is torch.float16


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown device 'gpuu'"):
        resolve_device("gpuu")
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        resolve_dtype("bfloat")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU"):
        resolve_device("cuda")
