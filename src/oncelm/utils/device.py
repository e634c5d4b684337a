"""Devices and dtypes by name."""

from __future__ import annotations

from typing import Any

import torch

from oncelm.utils.errors import check_choice, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

KV_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "int8": torch.int8}


def resolve_kv_dtype(name: str) -> torch.dtype | None:
    """A cache's dtype from its name; "auto" is None, the model's."""
    check_choice("kv-dtype", name, KV_DTYPES)
    return KV_DTYPES[name]


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch.dtype from its name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A torch.device from its name; None means the GPU if there is one. ValueError if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise unknown("device", device, ["cpu", "cuda", "cuda:0", "mps"]) from error
    if resolved.type == "meta":
        raise ValueError("device 'meta' holds no values; use 'cpu' or 'cuda'.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} asked for, but torch sees no GPU; use 'cpu'.")
    return resolved


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x there. From a CPU to a GPU it goes through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def send(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers (nested lists, an array, a tensor of the CPU) as a tensor on a device, without waiting for it."""
    return to_device(torch.as_tensor(values, dtype=dtype), device)
