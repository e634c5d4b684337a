"""Text files to one token stream, and the stream to training batches that depend on (seed, step) alone.

    text files -> token stream, uint32 [num_tokens] -> blocks of `seq_len` tokens -> batches [B, T]

A batch is computed from its step number, never from what was drawn before it, so that a resumed run sees
exactly the batches it would have seen: there is no iterator whose position could be lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A file is tokenized in pieces, several at once: one long string would use one core and a lot of memory.
PIECE_CHARACTERS = 1 << 16
PIECES_AT_ONCE = 16
# Byte-level tokenizers never merge a line break with the non-space after it: cutting there changes no token.
# (One that marks the start of a text, as SentencePiece does, adds a mark a piece: one token in some 15,000.)
_SAFE_CUT = re.compile(r"\n(?=\S)")


def text_files(path: str | Path) -> list[Path]:
    """The text files that `path` stands for: itself, or every .txt below it, in sorted order."""
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"data {str(root)!r} does not exist; give a text file or a folder of .txt files.")
    files = sorted(file for file in root.rglob("*.txt") if file.is_file())
    if not files:
        raise ValueError(f"data {str(root)!r} holds no .txt file; give a folder that has some.")
    return files


def read_text(file: Path) -> str:
    """One document: UTF-8, with line breaks as `\\n`, without byte order mark: as Python reads text files."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}; "
            "convert it to UTF-8 or leave it out."
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise ValueError(f"{file} is empty; put text into it or leave it out.")
    return text


def read_documents(path: str | Path) -> Iterator[str]:
    """The text of each file of `path`, one at a time."""
    return map(read_text, text_files(path))


def split_text(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut `text` into pieces of at least `size` characters, only where tokens never span the cut."""
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + size)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def tokenize(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The token stream of a text file or folder, uint32 [num_tokens]; an eos token ends every document.

    A progress bar appears when it takes longer than two seconds.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("tokenizer has no eos token to end every document with; set tokenizer.eos_token.")
    files = text_files(path)
    stream: list[np.ndarray] = []
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="tokenize", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for file in files:
            text = read_text(file)
            bytes_per_character = file.stat().st_size / len(text)
            for pieces in _groups(split_text(text), PIECES_AT_ONCE):
                # Text that spells a special token is text: only the documents' ends are special.
                ids = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)
                stream.extend(np.array(piece, dtype=np.uint32) for piece in ids["input_ids"])
                bar.update(bytes_per_character * sum(map(len, pieces)))
            stream.append(np.array([eos], dtype=np.uint32))
    return np.concatenate(stream)


class TokenDataset:
    """Blocks of `seq_len` tokens of one stream, shuffled anew in every epoch; the stream's end is held out.

    Each block starts with the last token of the block before, so that every token but the stream's first
    is predicted once an epoch (a model predicts `seq_len - 1` tokens of a block). Tokens that fill no
    block, fewer than `seq_len` at the stream's very end, are left out.

    Args:
        tokens: uint32 [num_tokens], in memory or mapped from a file.
        seq_len: tokens in a block, at least 2.
        seed: of the shuffles.
        validation_share: of the blocks, from the stream's end, rounded up to a whole block; 0 for none.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, *, seed: int = 0, validation_share: float = 0.05) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len must be at least 2 (one token and the next), got {seq_len}.")
        if not 0 <= validation_share < 1:
            raise ValueError(f"validation_share must be at least 0 and below 1, got {validation_share}.")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self._orders: dict[int, np.ndarray] = {}
        num_blocks = max(0, len(tokens) - 1) // (seq_len - 1)
        self.num_validation_blocks = int(np.ceil(validation_share * num_blocks))
        self.num_train_blocks = num_blocks - self.num_validation_blocks
        if self.num_train_blocks < 1:
            needed = 2 if validation_share else 1  # one block to learn from, one held out
            largest = (len(tokens) - 1) // needed + 1
            advice = f"use seq_len of at most {largest} or " if largest >= 2 else ""
            raise ValueError(
                f"the text has {len(tokens)} tokens, fewer than seq_len={seq_len} needs "
                f"({needed * (seq_len - 1) + 1}); {advice}give more text."
            )

    def batch(self, step: int, batch_size: int) -> torch.Tensor:
        """The blocks of one step, int64 [B, T]: a pure function of (seed, step) for a given batch size.

        Over the steps, the blocks of one epoch follow those of the epoch before, in one endless sequence;
        within an epoch none is dropped or repeated.
        """
        position = step * batch_size + np.arange(batch_size)
        epoch, index = np.divmod(position, self.num_train_blocks)
        # The orders in use are kept because shuffling takes time; a batch may reach into the next epoch.
        self._orders = {e: self._order(e) for e in np.unique(epoch).tolist()}
        return self._blocks(np.array([self._orders[e][i] for e, i in zip(epoch, index, strict=True)]))

    def validation_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The held-out blocks in the stream's order, int64 [B, T]; the last batch may be smaller."""
        first, last = self.num_train_blocks, self.num_train_blocks + self.num_validation_blocks
        for start in range(first, last, batch_size):
            yield self._blocks(np.arange(start, min(start + batch_size, last)))

    def _order(self, epoch: int) -> np.ndarray:
        """The blocks of `epoch` in the order they are seen, [num_train_blocks]."""
        if epoch in self._orders:
            return self._orders[epoch]
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_train_blocks)

    def _blocks(self, indices: np.ndarray) -> torch.Tensor:
        starts = indices * (self.seq_len - 1)
        rows = self.tokens[starts[:, None] + np.arange(self.seq_len)]
        return torch.from_numpy(rows.astype(np.int64))


def _groups(items: Iterator[str], size: int) -> Iterator[list[str]]:
    while group := list(islice(items, size)):
        yield group
