"""Which source the k-th sequence comes from, and which block of it: pure functions, of k and a seed.

Neither draws random numbers one after the other, so there is no state to save, and any k can be asked for.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from functools import lru_cache

_ROUNDS = 6
_MASK = (1 << 64) - 1
_RESOLUTION = 1 << 48  # of weights


def permute(index: int, size: int, *key: object) -> int:
    """Where `index` goes in a random-looking permutation of range(size): one for every key, in constant memory.

    A Feistel network permutes the numbers of an even count of bits, the least that holds `size`; a result that is
    too large is permuted again until it is not ("cycle walking"), 4 times at most on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=4096)
def _round_keys(key: tuple[object, ...]) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _mix(x: int) -> int:
    """A 64-bit number with every bit depending on all of x's (the finalizer of SplitMix64)."""
    x &= _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


class Schedule:
    """Deals the numbers 0, 1, 2, ... out to choices in proportion to their weights, as evenly as can be.

    Two choices of weights a and b are dealt with by a Beatty sequence: of the first k numbers, the first choice gets
    floor((k a + phase) / (a + b)). More choices are a tree of such pairs, built as Huffman's codes are. So in any n
    numbers in a row every choice has its share of n, give or take less than 4: over 10,000, 0.04 percent.

    Args:
        weights: above 0. Whole numbers are kept to exactly: of sum(weights) numbers from 0, choice i gets weights[i].
        seed: of the phases.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0) -> None:
        if not all(isinstance(weight, int) for weight in weights):
            total = sum(weights)
            weights = [max(1, round(weight / total * _RESOLUTION)) for weight in weights]
        # heap entries: (weight, tie-breaker, choice or (light child, heavy child, weight of the light one, phase))
        heap: list[tuple[int, int, int | tuple]] = [(int(w), i, i) for i, w in enumerate(weights)]
        heapq.heapify(heap)
        for number in range(len(weights), 2 * len(weights) - 1):
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            total = light[0] + heavy[0]
            phase = permute(0, total, "phase", seed, number)
            heapq.heappush(heap, (total, number, (light[2], heavy[2], light[0], total, phase)))
        self._root = heap[0][2]

    def locate(self, k: int) -> tuple[int, int]:
        """(choice, how many numbers below k it got): the second counts 0, 1, 2, ... for every choice."""
        node = self._root
        while isinstance(node, tuple):
            light, heavy, weight, total, phase = node
            before = (k * weight + phase) // total
            if ((k + 1) * weight + phase) // total > before:
                node, k = light, before
            else:
                node, k = heavy, k - before
        return node, k
