"""Snapshots in a folder: one safetensors file each, with what lies between its parent and it.

A file is written once, under a temporary name, and renamed; its name says the model and the text. Its header alone
says where it belongs, so a start reads headers only; a checksum covers the header and every tensor, and is compared
before anything of it is used. A child names its parent's checksum: it is of no use behind another computation of the
same text.

Any number of processes may use a folder. Files are never changed, so readers need no lock. Whoever writes or evicts
holds one, so that no parent goes while its child is written.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oncelm.engine.prefix.delta import Delta
from oncelm.engine.prefix.header import Damaged, Header, checksum_of
from oncelm.engine.prefix.tree import encode
from oncelm.utils.errors import is_out_of_memory
from oncelm.utils.files import atomic_file, clean_up

SUFFIX = ".safetensors"
_NAME = re.compile(r"([0-9a-f]{24})-([0-9a-f]{32})\.safetensors")
_OF_TENSOR = 128  # bytes of a tensor's line in a safetensors header, about
_TICK = 100_000_000  # nanoseconds

logger = logging.getLogger(__name__)


def is_snapshot(name: str) -> bool:
    """Whether a file is called as those of snapshots are."""
    return bool(_NAME.fullmatch(name))


class Folder:
    """The files of one model in a folder.

    Attributes:
        headers: of all files that are known, by key. Threads change it by single steps of a dict's alone.
        num_damaged: files that were of no use, and are deleted.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str, max_bytes: int | None = None) -> None:
        self.path = Path(path).absolute()
        self.fingerprint, self.max_bytes = fingerprint, sys.maxsize if max_bytes is None else max_bytes
        self.headers: dict[bytes, Header] = {}
        self.num_damaged = 0
        self._changed, self._looked = -1, 0  # the folder's time when it was looked at, and when that was
        self._used = 0
        self._unreadable: set[str] = set()
        self._warned: set[str] = set()
        with contextlib.suppress(OSError):
            clean_up(self.path)

    def place(self, key: bytes) -> Path:
        return self.path / f"{self.fingerprint}-{key.hex()}{SUFFIX}"

    # -- what is there --------------------------------------------------------------------------------------------

    def refresh(self) -> tuple[list[Header], list[bytes]]:
        """What others have written since, shortest first, and the keys of what they have removed."""
        before = set(self.headers)  # what this process writes from here on may lack in the listing
        try:
            changed, now = self.path.stat().st_mtime_ns, time.time_ns()
            # a change in the same tick of the folder's clock does not show: look once more when that is over
            if changed == self._changed and (self._looked > changed + _TICK or now <= changed + _TICK):
                return [], []
            names = dict(self._listing())
            self._changed, self._looked = changed, now
        except OSError:  # no such folder (yet, or any more), or one that may not be read
            names, self._changed = {}, -1
        gone = [key for key in before if key not in names]
        for key in gone:
            self.headers.pop(key, None)
        new = []
        for key, name in names.items():
            if key not in self.headers and name not in self._unreadable:
                try:
                    self.headers[key] = self._header(self.path / name)
                    new.append(self.headers[key])
                except FileNotFoundError:
                    continue
                except Damaged as error:
                    self._damaged(key, error)
                except OSError as error:
                    self._unreadable.add(name)
                    self.warn("unreadable", f"{self.path / name} cannot be read: {error}")
        return sorted(new, key=lambda header: header.n), gone

    def _listing(self) -> Iterator[tuple[bytes, str]]:
        for name in os.listdir(self.path):
            match = _NAME.fullmatch(name)
            if match and match[1] == self.fingerprint:
                yield bytes.fromhex(match[2]), name

    def _header(self, path: Path) -> Header:
        with _opened(path) as file:
            return self._own(Header.read(file.metadata() or {}), path)

    def _own(self, header: Header, path: Path) -> Header:
        if header.fingerprint != self.fingerprint or self.place(header.key) != path:
            raise Damaged("it is of another model or text than its name says")
        return header

    # -- a file ---------------------------------------------------------------------------------------------------

    def keep(self, header: Header, parent_checksum: str, text: bytes, delta: Delta) -> tuple[str, int, list[bytes]]:
        """As `write`, but what cannot be written, or whose parent was not, is not kept; the first time it is said."""
        if header.parent and not parent_checksum:
            return "", 0, []
        try:
            return self.write(replace(header, parent_checksum=parent_checksum), text, delta)
        except (OSError, NotImplementedError, Damaged, SafetensorError) as error:
            self.warn("write", f"a snapshot is not kept on disk: {error}")
            return "", 0, []

    def write(self, header: Header, text: bytes, delta: Delta) -> tuple[str, int, list[bytes]]:
        """Write a file, if there is none of the same text.

        Returns:
            its checksum ("" where what is there now, if anything, is not this), its bytes, and the keys of the files
            that had to go for it.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {f"rows.{name}": tensor for name, tensor in delta.wait().rows.items()}
        tensors |= {f"states.{name}": tensor for name, tensor in delta.states.items()}
        tensors["tokens"] = torch.frombuffer(bytearray(text), dtype=torch.int32)
        said = sum(len(name) + len(value) for name, value in header.metadata().items())
        total = sum(tensor.nbytes + _OF_TENSOR for tensor in tensors.values()) + said
        if total > self.max_bytes:
            self.warn("large", f"a snapshot of {total:,} bytes is not kept: the limit is {self.max_bytes:,}")
            return "", 0, []
        header = replace(header, checksum=checksum_of(header, tensors))
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):
            before = self.path.stat().st_mtime_ns
            try:
                return self._write_new(header, tensors, total)
            finally:
                if self._changed == before:  # all that has changed since is known
                    self._changed = self.path.stat().st_mtime_ns

    def _write_new(self, header: Header, tensors: dict[str, torch.Tensor], total: int) -> tuple[str, int, list[bytes]]:
        """The part of `write` that needs the lock."""
        if there := self.header_of(header.key):  # of another process: the same bits, or of no use to this one
            same = there[header.key].checksum == header.checksum
            return (header.checksum, self.file_size(header.key), []) if same else ("", 0, [])
        if header.parent and not self.place(header.parent).exists():
            return "", 0, []
        evicted = self._make_room(total, header.parent)
        with atomic_file(self.place(header.key)) as temporary:
            save_file(tensors, temporary, metadata=header.metadata())
        self.headers[header.key] = header
        self.touch([header.key])
        return header.checksum, self.file_size(header.key), evicted

    def read(self, key: bytes) -> tuple[Delta, bytes]:
        """What a file holds, and its tokens; every byte of it has been compared with its checksum.

        Raises:
            Damaged: it is not as it was written; it has been deleted then.
            OSError: it is gone, or cannot be read.
        """
        path, expected = self.place(key), self.headers.get(key)
        try:
            with _opened(path) as file:
                header = self._own(Header.read(file.metadata() or {}), path)
                # copied before they are compared: what lies in a file may be another thing when it is read again
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dict)
            if header != expected or header.checksum != checksum_of(header, tensors):
                raise Damaged("its checksum does not match")
            tokens = tensors.pop("tokens")
            if tokens.shape != (header.n - header.start,):
                raise Damaged("its tokens are not as many as it says")
        except Damaged as error:
            self._damaged(key, error)
            raise
        parts: dict[str, dict[str, torch.Tensor]] = {"rows": {}, "states": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        return Delta(parts["rows"], parts["states"]), encode(tokens.tolist())

    def _damaged(self, key: bytes, error: Damaged) -> None:
        self.num_damaged += 1
        self.warn("damaged", f"{self.place(key)} is damaged and is deleted: {error}")
        self.discard(key)

    def tokens(self, key: bytes) -> list[int]:
        """The tokens of a file alone, which are not compared with anything. Raises Damaged, OSError."""
        with _opened(self.place(key)) as file:
            return file.get_tensor("tokens").tolist()

    def discard(self, key: bytes) -> None:
        """Delete a file that is of no use."""
        self.headers.pop(key, None)
        try:
            self.place(key).unlink(missing_ok=True)
        except OSError as error:
            self._unreadable.add(self.place(key).name)
            self.warn("delete", f"{self.place(key)} cannot be deleted: {error}")

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were used now, the last one last, whatever the clock of the disk can tell apart."""
        for key in keys:
            self._used = max(time.time_ns(), self._used + 1000)
            try:
                os.utime(self.place(key), ns=(self._used, self._used))
            except OSError:  # gone, or of another user
                continue

    def header_of(self, key: bytes) -> dict[bytes, Header]:
        """What the file of a text says of itself, by key; nothing where there is none, and a damaged one is deleted."""
        try:
            return {key: self._header(self.place(key))}
        except FileNotFoundError:
            return {}
        except Damaged as error:
            self._damaged(key, error)
            return {}

    def file_size(self, key: bytes) -> int:
        """Bytes of a file; 0: it is gone."""
        try:
            return self.place(key).stat().st_size
        except OSError:
            return 0

    def _files(self) -> list[tuple[int, int, bytes]]:
        """Time of last use, bytes and key of each."""
        found = []
        for key, name in self._listing():
            try:
                status = (self.path / name).stat()
                found.append((status.st_mtime_ns, status.st_size, key))
            except OSError:
                continue
        return found

    def _make_room(self, num_bytes: int, parent: bytes) -> list[bytes]:
        """Delete what was not used for longest, leaves first, until a file of so many bytes fits; whoever calls holds
        the lock. Returns their keys."""
        evicted: list[bytes] = []
        if self.max_bytes == sys.maxsize:
            return evicted
        files = self._files()
        total = num_bytes + sum(size for _, size, _ in files)
        if total <= self.max_bytes:
            return evicted
        parents = {key: self._parent(key) for _, _, key in files}
        children = Counter([parent, *parents.values()])
        leaves = [file for file in files if not children[file[2]]]
        others = {file[2]: file for file in files if children[file[2]]}
        heapq.heapify(leaves)
        while leaves and total > self.max_bytes:
            _, size, key = heapq.heappop(leaves)
            self.discard(key)
            evicted.append(key)
            total -= size
            above = parents[key]
            children[above] -= 1
            if not children[above] and above in others:
                heapq.heappush(leaves, others[above])
        return evicted

    def _parent(self, key: bytes) -> bytes:
        """The parent of a file that others may have written just now; b"" for none, or where it cannot be told."""
        if (header := self.headers.get(key)) is None:
            try:
                header = self._header(self.place(key))
            except (Damaged, OSError):
                return b""
        return header.parent

    def warn(self, kind: str, message: str) -> None:
        """Say something of this kind once."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s. Further ones are not told of.", message)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """An open safetensors file; Damaged for one that is none, or was cut off, OSError for one that is gone, too."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        if is_out_of_memory(error):
            raise
        raise Damaged(" ".join(str(error).split())) from error
    except RuntimeError as error:  # torch's, which opens the file again for each tensor
        if path.exists() or is_out_of_memory(error):
            raise
        raise FileNotFoundError(errno.ENOENT, "removed while it was read", str(path)) from error
