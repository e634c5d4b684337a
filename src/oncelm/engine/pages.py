"""Who holds which page and which slot of the pool (cache/yoco/pool.py): bookkeeping alone, no memory.

Page 0 and slot 0 are never given out: padded rows of a CUDA graph write there.
"""

from __future__ import annotations

from collections.abc import Iterable


class Pages:
    """Pages 1 .. num_pages - 1, each held by any number of owners: requests that share a prefix, and snapshots.

    A page that nobody holds is free, and is given out again: the one released last first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - len(self._free)

    def references(self, page: int) -> int:
        """How many owners hold a page."""
        return self._references[page]

    def allocate(self, count: int) -> list[int] | None:
        """So many free pages, each held once; None, and nothing held, where there are fewer."""
        if count > len(self._free):
            return None
        split = len(self._free) - count
        pages = self._free[split:][::-1]
        del self._free[split:]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner holds each of these pages."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is shared and belongs to nobody"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner of each of these pages lets go of it."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is released and belongs to nobody"
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def check(self) -> None:
        """That pages are either free or held, and none twice or never (for tests)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        held = {page for page, count in enumerate(self._references) if count}
        assert not free & held, f"pages {free & held} are free and held"
        assert free | held == set(range(1, self.num_pages)), "a page is neither free nor held"


class Slots:
    """Slots 1 .. num_slots - 1, each held by one owner: a request, or a snapshot."""

    def __init__(self, num_slots: int) -> None:
        self._slots = Pages(num_slots)

    @property
    def num_slots(self) -> int:
        return self._slots.num_pages

    @property
    def num_free(self) -> int:
        return self._slots.num_free

    @property
    def num_used(self) -> int:
        return self._slots.num_used

    def allocate(self) -> int | None:
        """A free slot; None where there is none."""
        taken = self._slots.allocate(1)
        return taken[0] if taken else None

    def release(self, slot: int) -> None:
        self._slots.release((slot,))

    def check(self) -> None:
        """As Pages.check."""
        self._slots.check()
