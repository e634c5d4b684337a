"""The prefix cache: snapshots on the device, in CPU memory and on disk, found by the text that they stand on.

A snapshot at n is the shared keys and values of the first n tokens and the states after exactly these. It is restored
whole or not at all.

- On the device it is a slot of its own and a share of the pages of the request that made it. That request writes behind
  n alone, whoever resumes from it copies the last, partly filled page.
- Below, it is what lies between its parent and it, in CPU memory, in a file, or both (`below.py`).

What was not used for longest goes first: on the device any snapshot, below only leaves (whoever is used there uses its
ancestors). From the device it goes to CPU memory, if that is given; what goes from there is on disk, if a folder is.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from oncelm.engine.metrics import PrefixCounts
from oncelm.engine.prefix.below import Below
from oncelm.engine.prefix.delta import Storage, write_back, write_states
from oncelm.engine.prefix.tree import BLOCK, Chain, Snapshot, Tree, encode, root_digest
from oncelm.utils.errors import is_out_of_memory

if TYPE_CHECKING:
    import os

    from oncelm.engine.pages import Pages, Slots

Allocate = Callable[[int], list[int] | None]


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache knows of some tokens.

    Attributes:
        n: of the longest snapshot that they may resume from; 0: none.
        shared: how many of them begin another text that is known, to a border of a block or a snapshot; at least n.
        held_pages: pages that are shared on the device, which a request that resumes from it need not allocate.
    """

    n: int = 0
    shared: int = 0
    held_pages: int = 0
    snapshot: Snapshot | None = None


class PrefixCache:
    """See above. One thread calls it, the engine's.

    Args:
        pool, pages, slots: the device's memory, and who holds it.
        fingerprint: of whatever the contents depend on: weights, how they are multiplied, RoPE, layout.
        cpu_bytes: for snapshots in CPU memory.
        directory: for snapshots on disk; None: none there.
        disk_bytes: for those of this model; None: as many as there is room for.

    Attributes:
        counts: what happened so far.
    """

    def __init__(
        self,
        pool: Storage,
        pages: Pages,
        slots: Slots,
        fingerprint: str,
        *,
        cpu_bytes: int = 0,
        directory: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = None,
    ) -> None:
        self.pool, self.pages, self.slots = pool, pages, slots
        self.counts = PrefixCounts()
        self.tree = Tree()
        self._device: OrderedDict[Snapshot, None] = OrderedDict()  # the one that was used last is last
        self._shares: Counter[int] = Counter()  # of a page, by snapshots
        states, rows = pool.read_slot(0), pool.read_rows([0], 0, 1)
        self._slot_bytes = sum(state.nbytes for state in states.values())
        self._page_bytes = sum(row.nbytes for row in rows.values()) * pool.page_size
        layout = {name: [str(one.dtype), list(one.shape)] for name, one in [*states.items(), *rows.items()]}
        said = json.dumps([fingerprint, layout], sort_keys=True).encode()
        self.fingerprint = blake2b(said, digest_size=12).hexdigest()
        self._below = Below(pool, self.tree, self.counts, cpu_bytes, directory, self.fingerprint, disk_bytes)

    # -- what the engine calls ------------------------------------------------------------------------------------

    def chain(self, salt: str | None = None) -> Chain:
        """For the digests of one text, to be kept and given to `match` and `add` with it."""
        return Chain(root_digest(self.fingerprint, salt))

    def match(self, tokens: Sequence[int], salt: str | None = None, *, chain: Chain | None = None) -> Match:
        """What is known of `tokens`: at least one of them is left to be read."""
        self.counts.lookups += 1
        self._below.refresh()
        snapshot, shared = self.tree.find(tokens, chain or self.chain(salt))
        if snapshot is None:
            return Match(shared=shared)
        return Match(snapshot.n, shared, self._held(snapshot)[1] // self.pool.page_size, snapshot)

    def restore(self, match: Match, slot: int, allocate: Allocate) -> list[int] | None:
        """Make `slot` and pages what they were at match.n.

        Args:
            allocate: gives so many pages, or None.

        Returns:
            pages for match.n tokens, each held once by the caller. None where there are none left, where memory runs
            out on the way, or where the snapshot turned out to be gone or damaged: it is forgotten then, so that the
            next `match` finds another.
        """
        snapshot = match.snapshot
        if snapshot is None or not snapshot.known:
            return None
        try:
            deltas = self._below.deltas(snapshot)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        if deltas is None:
            return None
        holder, rows = self._held(snapshot)
        size = self.pool.page_size
        whole, total = rows // size, -(-snapshot.n // size)
        # held before more are asked for, which may evict whom they belong to
        theirs = list(holder.pages[: -(-rows // size)]) if holder else []
        source = snapshot.slot
        self.pages.share(theirs)
        own = allocate(total - whole)
        if own is None:
            self.pages.release(theirs)
            return None
        pages = [*theirs[:whole], *own]
        try:
            for page in theirs[whole:]:
                self.pool.copy_page(page, own[0])
            if source:
                self.pool.copy_slot(source, slot)
            else:
                for start, delta in deltas:
                    write_back(self.pool, delta, pages, start)
                write_states(self.pool, deltas[-1][1], slot)
        except Exception as error:
            self.pages.release(pages)
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            self.pages.release(theirs[whole:])
        if not source:
            self._hold(snapshot, slot, pages)
        self.counts.hits += 1
        self.counts.tokens_hit += snapshot.n
        self._touch(snapshot)
        return pages

    def add(
        self,
        tokens: Sequence[int],
        n: int,
        slot: int,
        pages: Sequence[int],
        salt: str | None = None,
        *,
        after: Snapshot | None = None,
        chain: Chain | None = None,
    ) -> Snapshot | None:
        """Keep the first n of `tokens`, whose states are in `slot` and whose rows are in `pages` now.

        Args:
            after: what this returned for the same request before, or the `snapshot` of the match that it resumed from:
                as far as that goes its rows are the same, and are kept once below the device.

        Returns:
            what to give as `after` next time.
        """
        assert 0 < n <= len(tokens), f"a snapshot at {n} of {len(tokens)} tokens"
        self._below.refresh()
        chain = chain or self.chain(salt)
        block, tail = chain.at(tokens, n // BLOCK), encode(tokens[n - n % BLOCK : n])
        while after is not None and not after.known:
            after = after.parent
        start = after.n if after else 0
        new = Snapshot(
            n,
            chain.digests[0],
            block,
            tail,
            after,
            chain.digests[start // BLOCK + 1 : n // BLOCK + 1],
            encode(tokens[start:n]),
        )
        if (there := self.tree.get(new.key)) is not None:
            self._touch(there)
            return there if there is after else after
        self.tree.insert(new)
        self._hold(new, slot, pages)
        if self._below.writes:
            self._below.copy(new, slot, pages)
        if not new.is_kept:
            self.tree.remove(new)
            return after
        self._touch(new)
        self.counts.added += 1
        return new

    def free(self, num_pages: int = 0, num_slots: int = 0, keep: Match | None = None) -> bool:
        """Let go of what was not used for longest, and would free some, until so many pages and slots are free.

        Returns:
            whether they are. Where they cannot be, nothing goes. What `keep` has on the device stays.
        """
        if self._are_free(num_pages, num_slots):
            return True
        kept = self._held(keep.snapshot)[0] if keep and keep.snapshot else None
        if not self._could_be_free(num_pages, num_slots, kept):
            return False
        for is_last_try in (False, True):
            for snapshot in list(self._device):
                # whoever else has its last page has the others too: it would go in vain
                in_vain = self.slots.num_free >= num_slots and self.pages.references(snapshot.pages[-1]) > 1
                if snapshot is not kept and (is_last_try or not in_vain):
                    self._leave_device(snapshot)
                    if self._are_free(num_pages, num_slots):
                        return True
        return False

    def forget(self, snapshot: Snapshot) -> None:
        """Keep a snapshot nowhere any more, nor what stands on it below the device: what it holds has proved wrong."""
        if snapshot.known:
            if snapshot.slot:
                self._let_go(snapshot)
            self._below.forget(snapshot)

    def flush(self) -> None:
        """Return when all that goes to the disk is there."""
        self._below.flush()

    def close(self) -> None:
        """Finish writing, and give pages and slots back."""
        self._below.close()
        for snapshot in list(self._device):
            self._let_go(snapshot)

    def snapshots(self) -> dict[str, int]:
        """How many there are on the device, in CPU memory and on disk; one may be in several places."""
        on_disk = sum(1 for snapshot in self.tree if snapshot.file)
        return {"device": len(self._device), "cpu": self._below.num_in_cpu_memory, "disk": on_disk}

    def nbytes(self) -> dict[str, int]:
        """Bytes there. On the device a page that several share, also with requests, counts once."""
        on_device = len(self._shares) * self._page_bytes + len(self._device) * self._slot_bytes
        on_disk = sum(snapshot.file for snapshot in self.tree)
        return {"device": on_device, "cpu": self._below.cpu_bytes, "disk": on_disk}

    # -- on the device --------------------------------------------------------------------------------------------

    def _held(self, snapshot: Snapshot) -> tuple[Snapshot | None, int]:
        """The nearest ancestor on the device, or the snapshot itself, and how many rows that has."""
        holder: Snapshot | None = snapshot
        while holder is not None and not holder.slot:
            holder = holder.parent
        return holder, holder.n if holder else 0

    def _hold(self, snapshot: Snapshot, slot: int, pages: Sequence[int]) -> None:
        """Keep a snapshot on the device that is in a request's slot and pages now, if there is a slot for it."""
        if not self.free(num_slots=1) or not snapshot.known:  # it was the one to go for the other's slot
            return
        own = self.slots.allocate()
        assert own is not None
        try:
            self.pool.copy_slot(slot, own)
        except Exception as error:
            self.slots.release(own)
            if not is_out_of_memory(error):
                raise
            return
        snapshot.slot, snapshot.pages = own, list(pages[: -(-snapshot.n // self.pool.page_size)])
        self.pages.share(snapshot.pages)
        self._shares.update(snapshot.pages)
        self._device[snapshot] = None

    def _touch(self, snapshot: Snapshot) -> None:
        """It was used now."""
        if snapshot.slot:
            self._device.move_to_end(snapshot)
        self._below.touch(snapshot)

    def _leave_device(self, snapshot: Snapshot) -> None:
        if not snapshot.is_below:
            self._below.copy(snapshot, snapshot.slot, snapshot.pages)
        self._let_go(snapshot)
        self.counts.evicted_device += 1
        self.tree.forget_unless_kept(snapshot)

    def _let_go(self, snapshot: Snapshot) -> None:
        del self._device[snapshot]
        self.slots.release(snapshot.slot)
        self.pages.release(snapshot.pages)
        for page in snapshot.pages:
            self._shares[page] -= 1
            if not self._shares[page]:
                del self._shares[page]
        snapshot.slot, snapshot.pages = 0, ()

    def _are_free(self, num_pages: int, num_slots: int) -> bool:
        return self.pages.num_free >= num_pages and self.slots.num_free >= num_slots

    def _could_be_free(self, num_pages: int, num_slots: int, kept: Snapshot | None) -> bool:
        slots = self.slots.num_free + len(self._device) - (kept in self._device)
        most = self.pages.num_free + len(self._shares)
        if slots < num_slots or most < num_pages:
            return False
        if self.pages.num_free >= num_pages:
            return True
        stay = set(kept.pages) if kept else ()
        alone = sum(self.pages.references(page) == shares for page, shares in self._shares.items() if page not in stay)
        return self.pages.num_free + alone >= num_pages
