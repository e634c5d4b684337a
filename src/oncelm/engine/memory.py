"""What requests have of the pool: slots and pages that are free, or that snapshots can do without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oncelm.engine.pages import Pages, Slots
from oncelm.engine.request import Request
from oncelm.utils.errors import is_out_of_memory

if TYPE_CHECKING:
    from oncelm.engine.prefix import Match, PrefixCache


class Memory:
    """Gives requests memory and takes it, all or none at a time.

    Args:
        cache: of prefixes; None: nothing is kept of what was read.
        keeps_below: the cache has room below the device, so that a snapshot outlives the memory that it was in.

    Attributes:
        num_dropped: how often a request has lost its memory; until that changes, who found none finds none.
    """

    def __init__(
        self,
        pages: Pages,
        slots: Slots,
        page_size: int,
        cache: PrefixCache | None = None,
        keeps_below: bool = False,
    ) -> None:
        self.pages, self.slots, self.page_size = pages, slots, page_size
        self.cache, self.keeps_below = cache, keeps_below
        self.num_dropped = 0

    def place(self, request: Request, spare_pages: int = 0) -> bool:
        """Give a request a slot and the pages of all its tokens, with what the cache has of them.

        Args:
            spare_pages: that must be left.

        Returns:
            whether there was enough.
        """
        count, match = self._num_pages(len(request.tokens)) + spare_pages, self.match(request)
        if match is not None and not self._free(count - match.held_pages, 1, match):
            match = None  # its own snapshot takes the memory that it needs
        if match is None and not self._free(count, 1):
            return False
        slot = self.slots.allocate()
        assert slot is not None
        request.slot = slot
        while match is not None and self.cache is not None:
            pages = self.cache.restore(match, slot, self._allocate)
            if pages is not None:
                request.pages, request.n, request.resumed = pages, match.n, match.snapshot
                if match.snapshot is not None:
                    request.snapshots.append(match.snapshot)
                break
            shorter = self.match(request)  # of a snapshot that was damaged, one before may still be whole
            match = shorter if shorter is not None and shorter.n < match.n else None
        if not self.reserve(request, len(request.tokens)):  # a snapshot that could not be restored after all
            self.drop(request)
            return False
        request.cuts = {cut for cut in request.cuts if cut > request.n}
        return True

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Make room for so many tokens of a request, if there are pages."""
        if num_tokens <= len(request.pages) * self.page_size:
            return True
        pages = self._allocate(self._num_pages(num_tokens) - len(request.pages))
        if pages is None:
            return False
        request.pages += pages
        return True

    def fork(self, request: Request, fork: Request) -> bool:
        """Give another answer to the same prompt a slot, and pages: full ones are shared, the last one is its own.

        What is in the slot and in the last page is for the caller to copy.
        """
        full = request.n // self.page_size
        count = self._num_pages(len(fork.tokens)) - full
        if not self._free(count, 1):
            return False
        slot, pages = self.slots.allocate(), self.pages.allocate(count)
        assert slot is not None
        assert pages is not None
        self.pages.share(request.pages[:full])
        fork.slot, fork.pages = slot, request.pages[:full] + pages
        fork.n, fork.resumed = request.n, request.resumed
        return True

    def drop(self, request: Request) -> None:
        """Take a request's memory, if it has any."""
        if request.slot:
            self.slots.release(request.slot)
            self.pages.release(request.pages)
            self.num_dropped += 1
        request.slot, request.pages, request.n, request.resumed = 0, [], 0, None

    # -- what is kept ---------------------------------------------------------------------------------------------

    def match(self, request: Request) -> Match | None:
        """What the cache has of a request's tokens; None where that is nothing, or must not be used."""
        if self.cache is None or request.wants_prompt_logprobs:
            return None
        if request.chain is None:
            request.chain = self.cache.chain(request.salt)
        tokens = request.tokens if request.max_tokens else [*request.tokens, 0]  # a match leaves one token to be read
        match = self.cache.match(tokens, request.salt, chain=request.chain)
        if match.shared >= match.n + self.page_size:  # what others read too: the next one shall find a snapshot there
            request.cuts.add(min(match.shared, request.end))
        return match if match.n else None

    def snapshot(self, request: Request, n: int) -> None:
        """Keep a request's memory, as it is at n; that there is no room for it is no error."""
        if self.cache is None:
            return
        if request.chain is None:
            request.chain = self.cache.chain(request.salt)
        try:
            made = self.cache.add(
                request.tokens, n, request.slot, request.pages, request.salt, after=request.resumed, chain=request.chain
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return
        if made is not None and made is not request.resumed:
            request.snapshots.append(made)
        request.resumed = made

    def forget(self, request: Request) -> None:
        """Keep nothing of what led to numbers that are not finite: it would fail others too."""
        for snapshot in request.snapshots:
            assert self.cache is not None
            self.cache.forget(snapshot)

    # -- what is free ---------------------------------------------------------------------------------------------

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _free(self, num_pages: int, num_slots: int = 0, keep: Match | None = None) -> bool:
        """Whether so many pages and slots are free, or were taken from snapshots."""
        if self.pages.num_free >= num_pages and self.slots.num_free >= num_slots:
            return True
        return self.cache is not None and self.cache.free(num_pages, num_slots, keep)

    def _allocate(self, count: int) -> list[int] | None:
        return self.pages.allocate(count) if self._free(count) else None
