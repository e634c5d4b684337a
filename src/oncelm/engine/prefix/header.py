"""The header of a snapshot's file: where it belongs, and the checksum of all of it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from hashlib import blake2b, sha256

import torch

from oncelm.engine.prefix.tree import BLOCK, snapshot_key

FORMAT = "oncelm-prefix-1"
_HASHED_AT_ONCE = 1 << 22  # bytes a thread
_THREADS = 8


class Damaged(ValueError):
    """A file is not as it was written, or is not what its name says."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        key: of the text (tree.snapshot_key), n tokens long.
        start: where its rows begin: the parent's n.
        parent, parent_checksum: of the file with what comes before; "" where start is 0.
        root: the digest of its model and salt, without a text.
        blocks: the digests of its full blocks behind those of the parent.
        block: the digest of its last full block, or `root`.
        tail: its tokens behind that, encoded.
        checksum: of all of it.
    """

    fingerprint: str
    key: bytes
    n: int
    start: int
    parent: bytes
    parent_checksum: str
    root: bytes
    blocks: tuple[bytes, ...]
    block: bytes
    tail: bytes
    checksum: str = ""

    def metadata(self) -> dict[str, str]:
        """As it stands in the file; with a digest of itself, so that damage to it shows when only it is read."""
        said = {"format": FORMAT, **{field.name: _text(getattr(self, field.name)) for field in fields(self)}}
        return {**said, "seal": blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()}

    @staticmethod
    def read(metadata: dict[str, str]) -> Header:
        """Raises Damaged for what no header of this format says."""
        try:
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            said = {field.name: metadata[field.name] for field in fields(Header)}
            blocks = bytes.fromhex(said["blocks"])
            header = Header(
                said["fingerprint"],
                bytes.fromhex(said["key"]),
                int(said["n"]),
                int(said["start"]),
                bytes.fromhex(said["parent"]),
                said["parent_checksum"],
                bytes.fromhex(said["root"]),
                tuple(blocks[place : place + 16] for place in range(0, len(blocks), 16)),
                bytes.fromhex(said["block"]),
                bytes.fromhex(said["tail"]),
                said["checksum"],
            )
        except (KeyError, ValueError) as error:
            raise Damaged(str(error)) from error
        if header.metadata() != metadata or not header._agrees():
            raise Damaged("its header contradicts itself")
        return header

    def _agrees(self) -> bool:
        return (
            0 <= self.start < self.n
            and bool(self.start) == bool(self.parent) == bool(self.parent_checksum)
            and len(self.blocks) == self.n // BLOCK - self.start // BLOCK
            and len(self.tail) == 4 * (self.n % BLOCK)
            and (self.block == self.blocks[-1] if self.blocks else self.n >= BLOCK or self.block == self.root)
            and self.key == snapshot_key(self.block, self.tail)
        )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return b"".join(value).hex()
    return value.hex() if isinstance(value, bytes) else str(value)


def checksum_of(header: Header, tensors: dict[str, torch.Tensor]) -> str:
    """Of all that a header says but this, and of the tensors' names, types, shapes and bytes; several threads hash."""
    digest = sha256(json.dumps(replace(header, checksum="").metadata()).encode())
    pieces: list[memoryview] = []
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        pieces += [content[at : at + _HASHED_AT_ONCE] for at in range(0, len(content), _HASHED_AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing leaves Python to other threads, which start when there is need
        for one in pool.map(lambda piece: sha256(piece).digest(), pieces):
            digest.update(one)
    return digest.hexdigest()
