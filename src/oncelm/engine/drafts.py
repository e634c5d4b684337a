"""Drafts of the next tokens by prompt lookup: where the last few tokens stood before, what followed may follow again.

An answer that quotes its prompt, edits a file or repeats itself is written several tokens a step; which drafts are
right is verified by the model (engine/work.py), so they change no token.

Looking a text of a million tokens through at each step would cost more than the step. An index of fixed size says for
each hash of n tokens behind which position they ended last; what it says is compared with the text, so a collision
costs a draft and is never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from oncelm.engine.params import SamplingParams

LONGEST, SHORTEST = 5, 3  # n-grams looked for; two tokens alone are found everywhere in a long text
MOST_ENTRIES = 1 << 21  # for each n, 4 bytes each
AT_ONCE = 1 << 18  # tokens taken in by one call of numpy, 8 bytes each and some temporary memory
FEW = 4  # drafts to begin with
MOST_PAUSE = 32  # steps without a draft
MIX, SHIFT = 0x9E3779B97F4A7C15, 29  # 2^64 / golden ratio, odd: multiplying by it spreads what is alike
MASK = (1 << 64) - 1


def can_draft(params: SamplingParams) -> bool:
    """Whether drafts leave a request's tokens as they are. A function of the user may keep a state of its own that one
    call a token moves on, and drafts that are not accepted would move it too."""
    return not params.logits_processors


class NgramIndex:
    """For each n from `longest` to `shortest`, where the n tokens with a given hash ended last.

    Attributes:
        ends: int32 [numbers of n, a power of two]; 0 for nowhere.
        known: n-grams that end up to this position are in it.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self.longest, self.shortest = longest, shortest
        self._clear(10)

    def _clear(self, bits: int) -> None:
        self.bits, self.known = bits, self.longest - 1
        self.ends = np.zeros((self.longest - self.shortest + 1, 1 << bits), np.int32)

    def find(self, tokens: Sequence[int]) -> int:
        """The position behind the latest earlier place of the last tokens, as many as possible; 0 if none is.

        Takes in the tokens that are new, which must follow those of the calls before.
        """
        end = len(tokens)
        if end <= self.known:
            return 0
        if end > self.ends.shape[1] // 2 and self.ends.shape[1] < MOST_ENTRIES:  # many would share a place
            self._clear(min(end * 4, MOST_ENTRIES).bit_length() - 1)
        while end - self.known > 8:  # for fewer, numpy's calls cost more than they save
            self._take_in(tokens, min(end - 1, self.known + AT_ONCE))
        found: Sequence[int] = ()
        for position in range(self.known + 1, end + 1):
            found = self._swap(tokens[position - self.longest : position], position)
        self.known = end
        last = tokens[end - self.longest :]
        for n, place in zip(range(self.longest, self.shortest - 1, -1), found, strict=True):
            if place and tokens[place - n : place] == last[-n:]:
                return place
        return 0

    def _swap(self, last: Sequence[int], position: int) -> list[int]:
        """Enter that the n-grams at the end of `last` end at `position`: where they ended before, the longest first."""
        value, before = 0, []
        for i in range(1, self.longest + 1):
            value = (value + last[-i]) * MIX & MASK
            value ^= value >> SHIFT
            if i >= self.shortest:
                row, place = self.ends[self.longest - i], value >> (64 - self.bits)
                before.append(int(row[place]))
                row[place] = position
        return before[::-1]

    def _take_in(self, tokens: Sequence[int], stop: int) -> None:
        """The same for all n-grams that end at positions known + 1 to stop."""
        first, count = self.known + 1, stop - self.known
        new = np.asarray(tokens[first - self.longest : stop], np.int64).view(np.uint64)
        value, positions = np.zeros(count, np.uint64), np.arange(first, stop + 1, dtype=np.int32)
        for i in range(1, self.longest + 1):
            value = (value + new[self.longest - i : self.longest - i + count]) * np.uint64(MIX)
            value ^= value >> np.uint64(SHIFT)
            if i >= self.shortest:  # of several at one place numpy leaves the last one
                self.ends[self.longest - i][value >> np.uint64(64 - self.bits)] = positions
        self.known = stop


class PromptLookup:
    """Drafts for one sequence, which only grows.

    Drafts that turn out wrong are not free: they are computed. So it proposes twice as many as were right the last
    time, and where none was it waits before it proposes again, twice as long each time: a text without copies is
    drafted for at few of its steps.

    Args:
        longest: tokens that must have stood before, if there is such a place; else fewer, down to
        shortest: tokens.
    """

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-grams of {shortest} to {longest} tokens: shortest must be from 1 to longest.")
        self.index = NgramIndex(longest, shortest)
        self.proposed: Sequence[int] = ()
        self.length = 0  # tokens that the proposed ones were to follow
        self.limit = FEW
        self.wait = self.pause = 0  # steps
        self.num_proposed = self.num_right = 0

    def propose(self, tokens: Sequence[int], max_drafts: int) -> list[int]:
        """What may follow `tokens` [L], at most `max_drafts` tokens; often none.

        To be called once a step of decoding, with all tokens so far: what came behind the last ones proposed says how
        good they were. Where fewer than those proposed are used, nothing breaks.
        """
        self._learn(tokens)
        if self.wait or max_drafts < 1:
            self.wait = max(self.wait - 1, 0)
            return []
        found = self.index.find(tokens)
        if not found:
            return []
        count = min(self.limit, max_drafts)
        drafts = list(tokens[found : found + count])
        while len(drafts) < count:  # what repeats itself goes on into the drafts themselves
            drafts.append(drafts[found - len(tokens)])
        self.proposed, self.length = drafts, len(tokens)
        self.num_proposed += count
        return list(drafts)

    def _learn(self, tokens: Sequence[int]) -> None:
        """How many of those proposed last were right, and what follows from it."""
        if not self.proposed or len(tokens) == self.length:
            return
        came = tokens[self.length : self.length + len(self.proposed)]
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.proposed, came, strict=False)))
        self.num_right += right
        if right:
            self.pause, self.limit = 0, 2 * right
        else:
            self.pause = min(2 * self.pause + 1, MOST_PAUSE)
            self.wait, self.limit = self.pause, FEW
        self.proposed = ()
