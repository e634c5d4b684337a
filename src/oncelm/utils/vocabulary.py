"""How many ids a tokenizer made on the spot may have; light, as settings are checked before anything is loaded."""

from __future__ import annotations

SMALLEST_BPE = 260  # 4 special tokens, 256 bytes
LARGEST_BPE = 1 << 20  # four times what the largest vocabularies have


def check_bpe_size(name: str, size: int | str) -> int:
    """A vocabulary size, as digits or a number; ValueError, which calls it `name`, where it is out of the range.

    >>> check_bpe_size("SIZE", "4096")
    4096
    """
    digits = str(size)
    if len(digits) > len(str(LARGEST_BPE)) or not SMALLEST_BPE <= int(digits) <= LARGEST_BPE:
        raise ValueError(
            f"{name} must be at least {SMALLEST_BPE} (4 specials, 256 bytes) and at most {LARGEST_BPE:,}, "
            f"got {digits[:20]}{'...' if len(digits) > 20 else ''}."
        )
    return int(digits)
