"""In which dtypes the weights of a model folder are stored, from the headers of its files: no weights are read."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from oncelm.models.registry import official_format
from oncelm.models.sharded import is_sharded_folder

# safetensors' name -> torch's
NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def stored_dtypes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Numbers stored in each dtype, by torch's name, the most first; none where `path` has no files of weights.

    Raises:
        ValueError: a file of weights is missing, damaged, or a pickle of anything but tensors.
    """
    counts: Counter[str] = Counter()
    for file in weight_files(Path(path)):
        try:
            for dtype, shape in _pickled(file) if file.suffix in (".bin", ".pth") else _safetensors(file):
                counts[dtype] += math.prod(shape)
        except Exception as error:  # a damaged file can lead torch's reader anywhere
            kind = "" if isinstance(error, SafetensorError | OSError) else f"{type(error).__name__}, "
            raise ValueError(f"{file.name} cannot be read ({kind}{str(error).partition(chr(10))[0]})") from error
    return dict(counts.most_common())


def weight_files(folder: Path) -> list[Path]:
    """The files that loading the folder would read."""
    if (official := official_format(folder)) is not None:
        return [folder / official.WEIGHTS]
    if is_sharded_folder(folder):
        return sorted(folder.glob("shard-*.safetensors"))
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            try:
                parts = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
                return sorted(folder / part for part in parts)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} names no files of weights ({error!r})") from error
    return []


def _safetensors(file: Path) -> Iterator[tuple[str, list[int]]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no dict
            header = tensors.get_slice(name)
            dtype = header.get_dtype()
            yield NAMES.get(dtype, dtype.lower()), header.get_shape()


def _pickled(file: Path) -> Iterator[tuple[str, list[int]]]:
    content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    while isinstance(content, dict) and set(content) == {"model"}:  # as YOCO's training code wraps it
        content = content["model"]
    for tensor in content.values():
        yield str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
