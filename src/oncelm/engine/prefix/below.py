"""Snapshots below the device: in CPU memory, on disk, or both, each as what lies between its parent and it.

All that is kept here has its parent here too. So only leaves go, those that were not used for longest first: whoever is
used uses its ancestors. What goes from CPU memory is on disk, if there is a folder: whatever is added is written at
once, by a thread of its own, so that a start finds it again however the process ended.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from oncelm.engine.metrics import PrefixCounts
from oncelm.engine.prefix.delta import Delta, Storage, copy_off
from oncelm.engine.prefix.tree import Snapshot, Tree
from oncelm.utils.errors import is_out_of_memory

if TYPE_CHECKING:
    from oncelm.engine.prefix.disk import Folder
    from oncelm.engine.prefix.header import Header

WAITING_BYTES = 2 << 30  # of copies that the disk has not taken yet
MOST_LATE = 1000  # snapshots that are to be copied when it has


class Below:
    """See above. All is called by one thread, the engine's; the writer's hands over what it has written.

    Attributes:
        cpu_bytes: in use.
    """

    def __init__(
        self,
        pool: Storage,
        tree: Tree,
        counts: PrefixCounts,
        cpu_bytes: int,
        directory: str | os.PathLike[str] | None,
        fingerprint: str,
        disk_bytes: int | None,
    ) -> None:
        self._pool, self._tree, self._counts, self._most = pool, tree, counts, cpu_bytes
        self._host: OrderedDict[Snapshot, None] = OrderedDict()  # the one that was used last is last
        self.cpu_bytes = 0
        self._folder: Folder | None = None
        if directory is not None:
            from oncelm.engine.prefix.disk import Folder  # here: most engines have none
            from oncelm.engine.prefix.writer import Writer

            self._folder = Folder(directory, fingerprint, disk_bytes)
            self._writer = Writer(WAITING_BYTES)
            self._written: deque[tuple[Snapshot, Delta, int, list[bytes]]] = deque()
            self._unplaced: dict[bytes, Header] = {}  # files whose parent is not here (yet)
            self._late: deque[Snapshot] = deque(maxlen=MOST_LATE)
            self.refresh()

    @property
    def writes(self) -> bool:
        """Whether there is a folder, into which what is added is written."""
        return self._folder is not None

    @property
    def num_in_cpu_memory(self) -> int:
        """Snapshots."""
        return len(self._host)

    def flush(self) -> None:
        """Return when all that was to be written is."""
        if self._folder is not None:
            self._writer.flush()
            self._take_written()

    def close(self) -> None:
        """Finish writing."""
        if self._folder is not None:
            self.flush()
            while self._late:
                self._catch_up()
                self.flush()
            self._writer.close()

    def copy(self, snapshot: Snapshot, slot: int, pages: Sequence[int]) -> None:
        """Copy a snapshot, which is in this slot and these pages, below the device, and before it what it stands on; as
        far as there is room."""
        if not (self._most or self._folder):
            return
        line = [snapshot]
        while (parent := line[-1].parent) is not None and not parent.is_below:
            line.append(parent)
        line.reverse()
        for place, one in enumerate(line):
            slot_of, pages_of = (slot, pages) if one is snapshot else (one.slot, one.pages)
            if self._is_in_vain() or not self._copy(one, slot_of, pages_of):
                if self._folder is not None:
                    self._late.extend(line[place:])
                return

    def _is_in_vain(self) -> bool:
        """Whether a copy would find no place: only the disk takes any, and is behind."""
        return not self._most and self._writer.is_behind

    def _copy(self, snapshot: Snapshot, slot: int, pages: Sequence[int]) -> bool:
        delta = self._copied(snapshot, slot, pages)
        if delta is None:
            return False
        self._write(snapshot, delta)
        self._keep_in_host(snapshot, delta)
        return snapshot.is_below

    def _copied(self, snapshot: Snapshot, slot: int, pages: Sequence[int]) -> Delta | None:
        """A copy of what lies between a snapshot and its parent, if there is memory for it."""
        if snapshot.text is None:
            return None
        try:
            return copy_off(self._pool, slot, pages, snapshot.start, snapshot.n)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _keep_in_host(self, snapshot: Snapshot, delta: Delta) -> None:
        if delta.nbytes > self._most or snapshot.host:
            return
        for other in list(self._host):
            if self.cpu_bytes + delta.nbytes <= self._most:
                break
            if other is not snapshot.parent and self._may_leave_host(other):
                self._leave_host(other)
        if self.cpu_bytes + delta.nbytes <= self._most:
            snapshot.host = delta
            self._host[snapshot] = None
            self.cpu_bytes += delta.nbytes

    def _may_leave_host(self, snapshot: Snapshot) -> bool:
        on_disk = bool(snapshot.file or snapshot.pending)
        return on_disk or not any(child.is_below for child in snapshot.children)

    def _leave_host(self, snapshot: Snapshot) -> None:
        delta = self._drop_host(snapshot)
        self._counts.evicted_cpu += 1
        if not (snapshot.file or snapshot.pending):
            self._write(snapshot, delta)
        self._tree.forget_unless_kept(snapshot)

    def _drop_host(self, snapshot: Snapshot) -> Delta:
        delta = snapshot.host
        assert delta is not None
        del self._host[snapshot]
        self.cpu_bytes -= delta.nbytes
        snapshot.host = None
        return delta

    def deltas(self, snapshot: Snapshot) -> list[tuple[int, Delta]] | None:
        """What lies between a snapshot and the nearest ancestor on the device, in order, and where each begins; nothing
        where it is there itself. None where some of it is lost, which is forgotten then."""
        deltas = []
        one: Snapshot | None = snapshot
        while one is not None and not one.slot:
            delta = one.host or one.pending or self._load(one)
            if delta is None:
                self._lose(one)
                return None
            deltas.append((one.start, delta))
            one = one.parent
        return deltas[::-1]

    def forget(self, snapshot: Snapshot) -> None:
        """What a snapshot holds is wrong: its file goes too."""
        if self._folder is not None:
            folder, key = self._folder, snapshot.key
            self._writer.submit(lambda: folder.discard(key))  # behind its own writing
        self._lose(snapshot)

    def _lose(self, snapshot: Snapshot) -> None:
        """A snapshot is below no more, so that what stands on it there is of no use either.

        Files stay: a start finds them again, should the one that they stand on come back.
        """
        lost = [snapshot]
        for one in lost:
            lost += [child for child in one.children if child.is_below]
            if one.host:
                self._drop_host(one)
            one.pending, one.file, one.checksum = None, 0, ""
        for one in reversed(lost):
            self._tree.forget_unless_kept(one)

    def touch(self, snapshot: Snapshot) -> None:
        """It was used now; and its ancestors, which are the last to go."""
        keys = []
        one: Snapshot | None = snapshot
        while one is not None:
            if one.host:
                self._host.move_to_end(one)
            if one.file:
                keys.append(one.key)
            one = one.parent
        if self._folder is not None and keys:
            folder = self._folder
            self._writer.submit(lambda: folder.touch(keys))

    # -- on disk --------------------------------------------------------------------------------------------------

    def _write(self, snapshot: Snapshot, delta: Delta) -> None:
        """Have a snapshot written, behind its parent; later, where the disk is behind with others."""
        if self._folder is None:
            return
        parent = snapshot.parent
        if (parent and not (parent.file or parent.pending)) or not self._submit(snapshot, delta):
            self._late.append(snapshot)

    def _catch_up(self) -> None:
        """Have written what was late, as far as there is room now and it is somewhere still."""
        while self._late and not self._writer.is_behind:
            late = self._late.popleft()
            parent = late.parent
            if not late.known or late.file or late.pending or (parent and not (parent.file or parent.pending)):
                continue
            delta = late.host or (self._copied(late, late.slot, late.pages) if late.slot else None)
            if delta is not None and not self._submit(late, delta):
                self._late.appendleft(late)
                return

    def _submit(self, snapshot: Snapshot, delta: Delta) -> bool:
        """Queue a snapshot; False where there is no room."""
        assert self._folder is not None
        parent = snapshot.parent
        folder, text = self._folder, snapshot.text
        assert text is not None
        from oncelm.engine.prefix.header import Header

        header = Header(
            folder.fingerprint,
            snapshot.key,
            snapshot.n,
            snapshot.start,
            parent.key if parent else b"",
            "",
            snapshot.root,
            tuple(snapshot.blocks),
            snapshot.block,
            snapshot.tail,
        )

        def write() -> None:
            # a parent is written before its children, by the same thread
            checksum, size, evicted = folder.keep(header, parent.checksum if parent else "", text, delta)
            if size:
                snapshot.checksum = checksum
            self._written.append((snapshot, delta, size, evicted))

        if not self._writer.submit(write, delta.nbytes):
            return False
        snapshot.pending = delta
        return True

    def _take_written(self) -> None:
        assert self._folder is not None
        while self._written:
            snapshot, delta, size, evicted = self._written.popleft()
            if snapshot.pending is delta:
                snapshot.pending, snapshot.file = None, size
                self._counts.not_written += not size
                if not snapshot.is_below:
                    self._lose(snapshot)
            elif size:  # lost meanwhile
                self._unplaced.update(self._folder.header_of(snapshot.key))
            for key in evicted:
                self._counts.evicted_disk += 1
                self._file_is_gone(key)

    def _file_is_gone(self, key: bytes) -> None:
        self._unplaced.pop(key, None)
        if (snapshot := self._tree.get(key)) is not None and snapshot.file:
            snapshot.file, snapshot.checksum = 0, ""
            if not snapshot.is_below:
                self._lose(snapshot)

    def refresh(self) -> None:
        """Take in what was written, by this process and by others."""
        if self._folder is None:
            return
        self._take_written()
        self._catch_up()
        new, gone = self._folder.refresh()
        self._counts.damaged = self._folder.num_damaged
        for key in gone:
            self._file_is_gone(key)
        self._unplaced.update({header.key: header for header in new})
        for header in sorted(self._unplaced.values(), key=lambda header: header.n):
            if self._place(header):
                del self._unplaced[header.key]

    def _place(self, header: Header) -> bool:
        """Make a snapshot of a file; False where it cannot be now: the file that it stands on is not there, or this
        process has computed the same text itself."""
        assert self._folder is not None
        if (there := self._tree.get(header.key)) is not None:
            return there.checksum == header.checksum
        parent = self._tree.get(header.parent) if header.parent else None
        if header.parent and not (parent and parent.checksum == header.parent_checksum and parent.n == header.start):
            return False
        if not header.blocks and header.block != (parent.block if parent else header.root):
            return False
        found = Snapshot(header.n, header.root, header.block, header.tail, parent, header.blocks, None)
        found.file, found.checksum = self._folder.file_size(header.key), header.checksum
        if found.file:
            self._tree.insert(found)
        return bool(found.file)

    def _load(self, snapshot: Snapshot) -> Delta | None:
        """What a file holds; None where it is gone or damaged."""
        from oncelm.engine.prefix.header import Damaged

        if self._folder is None or not snapshot.file:
            return None
        try:
            delta, snapshot.text = self._folder.read(snapshot.key)
        except FileNotFoundError:  # another process had to make room
            return None
        except (Damaged, OSError) as error:
            self._folder.warn("read", f"a snapshot of {snapshot.n:,} tokens is of no use: {error}")
            return None
        self._keep_in_host(snapshot, delta)
        return delta
