"""A cache on disk: one safetensors file, written atomically, checked when read.

Its header holds the sequence lengths, the fingerprint of the model that computed it, and a checksum of all of it: a
file of another model, a damaged or an incomplete file is refused with a ValueError.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oncelm.cache.base import Snapshot
from oncelm.utils.files import atomic_file

FORMAT = "oncelm-cache-2"


def save_snapshot(snapshot: Snapshot, path: str | os.PathLike[str], fingerprint: str) -> None:
    """Write a snapshot taken with `cache.snapshot()`; `fingerprint` is `model.fingerprint()`."""
    if snapshot.rewind_point is not None:
        raise ValueError("a rewind point has no shared K/V to save; take cache.snapshot(shared=True).")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}
    lengths, columns = json.dumps(snapshot.lengths), str(snapshot.columns)
    header = {"format": FORMAT, "fingerprint": fingerprint, "lengths": lengths, "columns": columns}
    if snapshot.kv_dtype is not None:
        header["kv_dtype"] = str(snapshot.kv_dtype).removeprefix("torch.")
    header["checksum"] = _checksum(tensors, header)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_snapshot(path: str | os.PathLike[str], fingerprint: str, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot for `cache.restore`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no OnceLM cache, damaged, or of a model with another fingerprint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no cache file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable cache file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not an OnceLM cache file (format {header.get('format')!r}, expected {FORMAT!r}).")
    if missing := {"fingerprint", "checksum", "lengths", "columns"} - header.keys():
        raise ValueError(f"{path} is damaged: its header lacks {', '.join(sorted(missing))}.")
    if header["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path} was computed by another model (fingerprint {header['fingerprint']}, this model {fingerprint})."
        )
    if header["checksum"] != _checksum(tensors, header):
        raise ValueError(f"{path} is damaged: its checksum does not match.")
    return Snapshot(
        {name: tensor.to(device) for name, tensor in tensors.items()},
        tuple(json.loads(header["lengths"])),
        int(header["columns"]),
        kv_dtype=_dtype(header.get("kv_dtype"), tensors),
    )


def _dtype(name: str | None, tensors: dict[str, torch.Tensor]) -> torch.dtype | None:
    """What the cache stored: as its global cache is, or by name; None where the file does not say (or is older)."""
    if "shared.k" in tensors:
        return tensors["shared.k"].dtype
    named = getattr(torch, name or "", None)
    return named if isinstance(named, torch.dtype) else None


def _checksum(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> str:
    said = [header[name] for name in ("lengths", "columns", "kv_dtype") if name in header]  # older files lack the last
    digest = hashlib.blake2b(" ".join(said).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # a damaged header may say: no dimensions
    return digest.hexdigest()
