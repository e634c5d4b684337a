"""Reads weights that several processes of a training run saved, each its parts, with torch.distributed.checkpoint."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

# a warning of torch.distributed.checkpoint whenever a process alone reads or writes, here and in `oncelm.train.saving`
SAID_OF_A_LONE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"


def is_sharded_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder of such parts."""
    return Path(path).is_dir() and next(Path(path).glob("shard-*.safetensors"), None) is not None


def read_shards(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The whole tensors by name, on the CPU."""
    import torch.distributed.checkpoint as dcp  # takes long to import, for few folders
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(path))
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata  # safetensors hold nothing but tensors
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SAID_OF_A_LONE_PROCESS, UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
