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


def bpe_size(tokenizer: str) -> int | None:
    """The vocabulary size of a tokenizer that is to be made from text, "bpe:SIZE"; None for another name.

    >>> bpe_size("bpe:4096")
    4096
    """
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not size.isdecimal():
        raise ValueError(f"tokenizer {tokenizer!r}: after 'bpe:' comes the vocabulary size, as in 'bpe:4096'.")
    return check_bpe_size(f"tokenizer {tokenizer!r}: the vocabulary size", size)
