"""Conversations for supervised fine-tuning: JSONL to packed rows whose targets are the assistant's tokens.

    file:line -> messages -> tokens, and which of them the assistant wrote -> rows [T] of whole conversations

`oncelm.data.chats` says what a line may look like, `oncelm.data.templates` how it becomes tokens.
"""

from __future__ import annotations

import bisect
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from oncelm.data.batch import TrainBatch
from oncelm.data.chats import Chat, read_chat
from oncelm.data.folder import Listing, list_folder
from oncelm.data.reading import JSONL, lines_of
from oncelm.data.sampler import permute
from oncelm.data.templates import encode
from oncelm.models.inputs import IGNORE_INDEX
from oncelm.utils.errors import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversation:
    """Tokens [n] of any unsigned type, and which of them the assistant wrote, [n] booleans; `where` is file:line."""

    tokens: np.ndarray
    answer: np.ndarray
    where: str


def conversation_files(path: str | os.PathLike[str]) -> Listing:
    """The files of conversations below a folder, or a file itself."""
    given = Path(path)
    if not given.exists():
        raise FileNotFoundError(f"no conversations at {given}.")
    if not given.is_dir():
        return Listing(given, (given,))
    listing = list_folder(given, JSONL)
    if not listing.files:
        reason = f"; {listing.describe()}" if listing.left_out else ""
        raise ValueError(f"{given} holds no {' or '.join(JSONL)} file of conversations{reason}.")
    return listing


def read_conversations(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Conversation]:
    """All conversations of a file or folder, cut to `max_tokens`, but those without an answer to learn.

    Warnings tell what is cut, what is left out and why, and which fields and files are not read.

    Raises:
        ValueError: a line that is no conversation, as file:line and the reason; none at all.
    """
    found: list[Conversation] = []
    lost: Counter[str] = Counter()  # conversations, by reason
    unread: Counter[str] = Counter()  # lines, by field
    cut = 0
    listing = conversation_files(path)
    for file in listing.files:
        for number, line in lines_of(file):
            where = f"{file}:{number}"
            try:
                chat = read_chat(line)
                tokens, answer = encode(chat, tokenizer)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            unread.update(chat.unread)
            cut += len(tokens) > max_tokens
            conversation = Conversation(tokens[:max_tokens], answer[:max_tokens], where)
            if conversation.answer[1:].any():
                found.append(conversation)
            else:
                lost[_why_lost(chat, answer, max_tokens)] += 1
    _warn(listing, unread, cut, lost, max_tokens)
    if not found:
        reasons = "; ".join(f"{count} left out: {reason}" for reason, count in lost.items()) or "every line is blank"
        raise ValueError(f"{path} holds no conversation to learn from ({reasons}).")
    return found


def _why_lost(chat: Chat, answer: np.ndarray, max_tokens: int) -> str:
    if not chat.learned:
        return "no answer is to be learned, as its weight (train, loss) says"
    if not answer[1:].any():
        return "the tokenizer's chat template marks no answer"
    return f"no answer remains in the first seq_len={max_tokens} tokens"


def _warn(listing: Listing, unread: Counter[str], cut: int, lost: Counter[str], max_tokens: int) -> None:
    if cut or lost:
        left_out = "".join(f"; {count} are left out: {reason}" for reason, count in lost.items())
        logger.warning("%d conversations are longer than seq_len=%d tokens and are cut%s", cut, max_tokens, left_out)
    if unread:
        fields = ", ".join(f"{printable(field)} ({count:,} lines)" for field, count in sorted(unread.items()))
        logger.warning("fields that are not read: %s", fields)
    if listing.left_out:
        logger.warning("%s", listing.describe())


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which items share a row of `size`: each into the fullest row that has room, the longest first ("best fit")."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row that is not full, ascending: (tokens left, row)
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[item], -1))
        left, row = room.pop(place) if place < len(room) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        if left > lengths[item]:
            bisect.insort(room, (left - lengths[item], row))
    return rows


class ConversationDataset:
    """Rows of whole conversations: a pure function of (seed, step), as `TokenDataset`'s.

    Rows are packed once and shuffled anew in every epoch. What remains of a row is padding, a sequence of its own
    without targets. Conversations attend to themselves only.

    Args:
        conversations: held in memory, 5 bytes a token.
        seq_len: tokens in a row; at least as many as the longest conversation.
        pad_id: what rows are filled up with.
        validation_fraction: of the conversations, from their end, that are held out.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        seq_len: int,
        *,
        pad_id: int = 0,
        seed: int = 0,
        validation_fraction: float = 0.05,
    ) -> None:
        num_train = len(conversations) - int(np.ceil(validation_fraction * len(conversations)))
        if num_train < 1:
            raise ValueError(f"{len(conversations)} conversation(s) are too few to hold {validation_fraction:.0%} out.")
        self.conversations, self.seq_len, self.pad_id, self.seed = conversations, seq_len, pad_id, seed
        lengths = [len(conversation.tokens) for conversation in conversations]
        self._num_targets = [int(one.answer[1:].sum()) for one in conversations]
        self._train = pack(lengths[:num_train], seq_len)
        self._valid = [[num_train + item for item in row] for row in pack(lengths[num_train:], seq_len)]

    @property
    def largest_id(self) -> int:
        return max(int(conversation.tokens.max()) for conversation in self.conversations)

    def batch(self, step: int, count: int, rows: slice | None = None) -> TrainBatch:
        """Those rows of the step's `count`, [B, T]; the assistant's tokens are learned, but for a first one."""
        return self._read(self._rows(step, count, rows))

    def num_targets(self, step: int, count: int) -> int:
        """Tokens that are learned in a step."""
        return sum(self._num_targets[item] for row in self._rows(step, count, None) for item in row)

    def validation_batches(self, count: int) -> Iterator[TrainBatch]:
        for start in range(0, len(self._valid), count):
            yield self._read(self._valid[start : start + count])

    def describe(self, k: int) -> str:
        """The lines that row k of the run is made of."""
        return ", ".join(self.conversations[item].where for item in self._row(k))

    def _row(self, k: int) -> list[int]:
        epoch, index = divmod(k, len(self._train))
        return self._train[permute(index, len(self._train), self.seed, "conversations", epoch)]

    def _rows(self, step: int, count: int, rows: slice | None) -> list[list[int]]:
        return [self._row(step * count + row) for row in range(count)[rows or slice(None)]]

    def _read(self, rows: Sequence[Sequence[int]]) -> TrainBatch:
        tokens = np.full((len(rows), self.seq_len), self.pad_id, dtype=np.int64)
        labels = np.full_like(tokens, IGNORE_INDEX)
        lengths: list[int] = []
        for row, items in enumerate(rows):
            end = 0
            for one in (self.conversations[item] for item in items):
                start, end = end, end + len(one.tokens)
                tokens[row, start:end] = one.tokens
                labels[row, start:end][one.answer] = one.tokens[one.answer]
                labels[row, start] = IGNORE_INDEX
                lengths.append(end - start)
            if end < self.seq_len:
                lengths.append(self.seq_len - end)
        return TrainBatch(torch.from_numpy(tokens), torch.from_numpy(labels), tuple(lengths))
