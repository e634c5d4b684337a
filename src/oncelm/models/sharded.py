"""Weights that several processes of a training run saved, each its parts, by torch.distributed.checkpoint."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

# said whenever a process alone reads or writes a checkpoint, here and in `oncelm.train.saving`
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def is_sharded_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder of such parts."""
    return Path(path).is_dir() and next(Path(path).glob("shard-*.safetensors"), None) is not None


def read_shards(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The whole tensors by name, on the CPU."""
    reader = HuggingFaceStorageReader(str(path))
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata  # safetensors hold nothing but tensors
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
