"""Texts to evaluate on: bundled ones by name, a file, or a folder of files, in the formats of training data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from oncelm.data.corpora import CORPORA, iterate_corpus
from oncelm.data.layout import find_corpus
from oncelm.data.reading import DamagedText, Malformed, Piece, is_text, read, scan
from oncelm.utils.errors import unknown

if TYPE_CHECKING:
    from oncelm.eval.codec import Codec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A text with a name for the record."""

    name: str
    text: str


def read_documents(source: str) -> Iterator[Document]:
    """The documents of a source, in order.

    Args:
        source: "sotu" (all addresses, in date order), "moby_dick" (the book), or a path: a .txt file is one document,
            each line of a .jsonl file is one; a folder is all such files in it, as for `oncelm data`.

    Raises:
        ValueError: nothing there, nothing in it, not UTF-8 text, a line without text.
    """
    if is_bundled(source):
        yield Document(source, "".join(_bundled(source)))
        return
    if not Path(source).exists():
        raise unknown("text", source, (*CORPORA, "a file or folder that exists"))
    corpus = find_corpus(source)
    if corpus.left_out:
        logger.warning("%s", corpus.left_out)
    for file in (file for part in corpus.sources for file in part.files):
        for piece in scan(file):
            yield from _read_piece(file, piece)


def read_utf8(file: Path) -> str:
    """A file's text without byte order mark; ValueError naming the file if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error


def is_bundled(source: str) -> bool:
    return source in CORPORA and not Path(source).exists()


def _bundled(source: str) -> Iterator[str]:
    """The parts of a bundled text, unpacked as they are asked for."""
    between = ""
    for part in iterate_corpus(source):
        yield f"{between}{part.title}\n\n{part.text}"
        between = "\n\n"


def _read_piece(file: Path, piece: Piece) -> Iterator[Document]:
    try:
        for item in read(piece):
            if isinstance(item, Malformed):
                raise ValueError(f"line {item.line} of {file} is no document: {item.reason}.")
            text = "".join(item.parts)
            if text.strip():
                yield Document(file.stem if is_text(str(file)) else f"{file.stem}:{item.line}", text)
    except DamagedText as error:
        raise ValueError(f"{file} is {error}; convert it to UTF-8 or leave it out.") from None


class Haystack:
    """The tokens of a source as one endless row: from the last document it goes on at the first.

    Text is encoded as far as it is asked for, once.
    """

    def __init__(self, source: str, codec: Codec) -> None:
        self.source, self.codec = source, codec
        texts = [_bundled(source)] if is_bundled(source) else ([document.text] for document in read_documents(source))
        self._pieces = (piece for parts in texts for piece in codec.stream(chain(parts, "\n")))
        self._ids = np.empty(0, np.int32)
        self._whole = False
        self._sentence_ends: dict[int, bool] = {}

    def take(self, start: int, count: int) -> np.ndarray:
        """Ids start to start + count, int32 [count]. Text repeats only where there is no more of it."""
        self._grow(start + count)
        if not len(self._ids):
            raise ValueError(f"the haystack {self.source!r} is empty: give a file or folder with text.")
        if start + count <= len(self._ids):
            return self._ids[start : start + count]
        return self._ids[np.arange(start, start + count) % len(self._ids)]

    def ends_before(self, place: int) -> bool:
        """Whether all the text there is has fewer than `place` tokens."""
        self._grow(place)
        return len(self._ids) < place

    def _grow(self, count: int) -> None:
        parts = [self._ids]
        have = len(self._ids)
        while have < count and not self._whole:
            piece = next(self._pieces, None)
            if piece is None:
                self._whole = True
            else:
                parts.append(piece)
                have += len(piece)
        self._ids = np.concatenate(parts)

    def sentence_end(self, ids: np.ndarray, place: int, reach: int = 500) -> int:
        """The last place at or before `place` where a sentence ends; `place` if there is none within `reach` tokens."""
        if place in (0, len(ids)):
            return place
        for i in range(place, max(0, place - reach), -1):
            token = int(ids[i - 1])
            if token not in self._sentence_ends:
                self._sentence_ends[token] = self.codec.decode([token]).rstrip().endswith((".", "!", "?"))
            if self._sentence_ends[token]:
                return i
        return place
