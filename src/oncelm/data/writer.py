"""Documents to the two files of a shard: many threads encode while the next are read; written in order."""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from oncelm.data.encoding import LONG_TEXT, Encoder
from oncelm.data.reading import DamagedText, Document, Malformed
from oncelm.data.shards import token_dtype

BATCH_CHARACTERS = 1 << 18  # of short documents that are encoded in one call


class ShardWriter:
    """Takes documents in; what there is to say of the shard is right after `finish`.

    Args:
        tokens, documents: the shard's files, open for writing (see `oncelm.data.shards`).
        encoder: of the documents.
        bos: start every document with the tokenizer's bos token.
        pool: threads that encode. This one reads, and writes.
        ahead: how many batches of short documents, or pieces of a long one, may be encoded now and not written yet.
    """

    def __init__(
        self,
        tokens: BinaryIO,
        documents: BinaryIO,
        encoder: Encoder,
        *,
        bos: bool,
        pool: ThreadPoolExecutor,
        ahead: Callable[[], int],
    ) -> None:
        self.num_tokens = self.num_documents = self.longest = self.largest_id = 0
        self.checksums = {"tokens": 0, "documents": 0}
        self._tokens, self._documents, self._encoder = tokens, documents, encoder
        self._dtype = token_dtype(encoder.vocab_size)
        self._head = array("I", [encoder.tokenizer.bos_token_id] if bos else [])
        self._tail = array("I", [encoder.tokenizer.eos_token_id])
        self._pool, self._ahead = pool, ahead
        self._waiting: list[str] = []
        self._waiting_characters = 0
        # what is to be done next, in order, and what it is done with once a thread has made it
        self._queue: deque[tuple[Callable[..., None], Future[Any] | None]] = deque()
        # of the long document that is written: what was before it (bytes, their checksum, largest id), tokens so far
        self._before, self._length = (0, 0, 0), 0

    def add(self, document: Document) -> Malformed | None:
        """Take one document in, or say what is wrong with it."""
        parts = iter(document.parts)
        try:
            first = next(parts, "")
            if not first:
                return Malformed(0, "the file is empty")
            if len(first) > LONG_TEXT:
                return self._add_long(chain([first], parts))
            second = next(parts, None)
        except DamagedText as error:
            return Malformed(0, str(error))
        if second is not None:
            return self._add_long(chain([first, second], parts))
        self._waiting.append(first)
        self._waiting_characters += len(first)
        if self._waiting_characters >= BATCH_CHARACTERS:
            self.flush()
        return None

    def flush(self) -> None:
        """Have the short documents encoded that were gathered."""
        if self._waiting:
            self._then(self._write_documents, self._encoder.encode, self._waiting)
            self._waiting, self._waiting_characters = [], 0

    def finish(self) -> None:
        """Write everything that was added."""
        self.flush()
        while self._queue:
            self._do_next()

    def _add_long(self, parts: Iterator[str]) -> Malformed | None:
        self.flush()
        self._then(self._begin_long)
        try:
            for text, continued in self._encoder.pieces(parts):
                self._then(self._write_piece, self._encoder.encode_piece, text, continued)
        except DamagedText as error:  # found behind what may be written already
            self._then(self._take_back)
            return Malformed(0, str(error))
        self._then(self._end_long)
        return None

    # -- what is done in order ---------------------------------------------------------------------------------------

    def _then(self, action: Callable[..., None], make: Callable[..., Any] | None = None, *arguments: Any) -> None:
        """Behind all that is to be done: `action`, with what `make(*arguments)` gives in another thread."""
        self._queue.append((action, None if make is None else self._pool.submit(make, *arguments)))
        while sum(made is not None for _, made in self._queue) > self._ahead():
            self._do_next()

    def _do_next(self) -> None:
        action, made = self._queue.popleft()
        if made is None:
            action()
        else:
            action(made.result())

    def _write_documents(self, encoded: Iterable[array[int]]) -> None:
        for ids in encoded:
            self._write(self._head + ids + self._tail)
            self._end_document(len(self._head) + len(ids) + len(self._tail))

    def _begin_long(self) -> None:
        self._before = (self._tokens.tell(), self.checksums["tokens"], self.largest_id)
        self._length = len(self._head)
        self._write(self._head)

    def _write_piece(self, ids: array[int]) -> None:
        self._write(ids)
        self._length += len(ids)

    def _take_back(self) -> None:
        begin, self.checksums["tokens"], self.largest_id = self._before
        self._tokens.seek(begin)
        self._tokens.truncate()

    def _end_long(self) -> None:
        self._write(self._tail)
        self._end_document(self._length + len(self._tail))

    def _write(self, ids: array[int]) -> None:
        tokens = np.frombuffer(ids, dtype=np.uint32)
        self.largest_id = max(self.largest_id, int(tokens.max(initial=0)))
        content = tokens.astype(self._dtype).tobytes()
        self.checksums["tokens"] = zlib.crc32(content, self.checksums["tokens"])
        self._tokens.write(content)

    def _end_document(self, length: int) -> None:
        self.num_tokens += length
        self.num_documents += 1
        self.longest = max(self.longest, length)
        content = self.num_tokens.to_bytes(8, "little")
        self.checksums["documents"] = zlib.crc32(content, self.checksums["documents"])
        self._documents.write(content)
