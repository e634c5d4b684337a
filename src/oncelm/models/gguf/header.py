"""The head of a GGUF file: its metadata and the table of its tensors.

The package gguf has a reader too, but it loops over every length that a file names: one damaged number, and it runs
until the memory is full. Here every length is compared with what is left of the file first.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_DIMENSIONS = 4


class Tensor(NamedTuple):
    """A tensor of the file, still packed."""

    kind: int  # a GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as torch counts
    start: int  # byte of the file
    size: int  # bytes


class Header(NamedTuple):
    metadata: dict[str, Any]  # arrays of numbers are NumPy arrays, arrays of text are lists
    tensors: dict[str, Tensor]
    data: mmap.mmap  # the whole file


def read_header(file: Path) -> Header:
    """The head of a file that is whole.

    Raises:
        ValueError: not GGUF, of another version or byte order, damaged, or cut off.
    """
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{file} is no GGUF file: it does not start with {MAGIC.decode()}.")
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        at = _Cursor(data, len(MAGIC))
        version = at.number("I")
        if version in VERSIONS:
            return _read(at)
    except (ValueError, struct.error) as error:
        raise ValueError(f"{file} is damaged, or cut off after {len(data):,} bytes ({error}).") from error
    if version & 0xFFFF == 0:
        raise ValueError(f"{file} is a big-endian GGUF file; only little-endian ones can be read.")
    raise ValueError(f"{file} is a GGUF file of version {version}; versions 2 and 3 can be read.")


def short(value: object) -> str:
    """A value of the metadata as errors show it."""
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _read(at: _Cursor) -> Header:
    tensor_count, key_count = at.number("Q"), at.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = at.text()
        if key in metadata:
            raise ValueError(f"the key {key} stands there twice")
        metadata[key] = at.value(at.number("I"))
    table = {}
    for _ in range(tensor_count):
        name = at.text()
        dimensions = at.number("I")
        if name in table or dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} stands there twice, or has {dimensions} dimensions")
        table[name] = (at.numbers("Q", dimensions).tolist(), at.number("I"), at.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-at.byte // alignment) * alignment
    tensors = {name: _tensor(name, *entry, start, len(at.data)) for name, entry in table.items()}
    return Header(metadata, tensors, at.data)


def _tensor(name: str, columns_first: list[int], kind: int, offset: int, start: int, end_of_file: int) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        items, size_of_items = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]  # numbers of a block, and its bytes
    except (ValueError, KeyError) as error:
        raise ValueError(f"tensor {name} is packed as kind {kind}, which the package gguf does not know") from error
    if not columns_first or 0 in columns_first or columns_first[0] % items:
        raise ValueError(f"tensor {name} has the shape {columns_first}, in blocks of {items}")
    tensor = Tensor(kind, tuple(columns_first[::-1]), start + offset, math.prod(columns_first) // items * size_of_items)
    if tensor.start + tensor.size > end_of_file:
        raise ValueError(f"tensor {name} ends at byte {tensor.start + tensor.size:,}")
    return tensor


class _Cursor:
    """A place in the file, behind what has been read."""

    def __init__(self, data: mmap.mmap, byte: int) -> None:
        self.data, self.byte = data, byte

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.byte)
        self.byte += struct.calcsize(f"<{form}")
        return value

    def numbers(self, form: str, count: int) -> np.ndarray:
        kind = np.dtype(f"<{form}")
        self._check(count * kind.itemsize)
        values = np.frombuffer(self.data, kind, count, self.byte)
        self.byte += values.nbytes
        return values

    def text(self) -> str:
        length = self.number("Q")
        self._check(length)
        self.byte += length
        return self.data[self.byte - length : self.byte].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"a value of kind {kind} at byte {self.byte:,}")
        of, count = self.number("I"), self.number("Q")
        if of in SCALARS:
            return self.numbers(SCALARS[of], count)
        if of != STRING:
            raise ValueError(f"an array of kind {of} at byte {self.byte:,}")
        self._check(8 * count)  # each begins with its length
        return [self.text() for _ in range(count)]

    def _check(self, size: int) -> None:
        if size > len(self.data) - self.byte:
            raise ValueError(f"{size:,} bytes named at byte {self.byte:,}")
