"""Files to documents, streamed: JSONL (plain, gzip or zstd), Parquet and plain text.

A file is read in pieces, so that several threads share a large one and a restart repeats little:

    scan(file) -> pieces, each with the SHA-256 of its bytes       read(piece) -> documents, and what was malformed

A plain JSONL file is cut at line breaks into pieces of about `PIECE_BYTES`; any other file is one piece.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from oncelm.utils.errors import printable

PIECE_BYTES = 64 << 20
MAX_LINE_BYTES = 128 << 20  # a longer line is not read: that file is not JSONL
_LARGE_LINE_BYTES = 8 << 20  # such lines, which take several times their size while they are parsed, ...
_one_large_line = threading.Lock()  # ... are so one at a time
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_FIELDS = ("text", "content", "raw_content_lines")
_PART_CHARACTERS = 4 << 20  # of a large text, at a time
# Strings, to pass over, and behind them what JSON does not have. The end of a string may lack: else one that is cut off
# would be looked through again from each of its quotes.
_NO_NUMBER = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+"?)|NaN|-?Infinity', re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of a file as it was at `mtime_ns`; `line` is the number of lines before them."""

    path: str
    start: int
    stop: int
    line: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Document:
    """A text, in parts that join to it: a large plain text file is never in memory as a whole."""

    line: int  # of the file, from 1; a row for Parquet
    parts: Iterable[str]


@dataclass(frozen=True)
class Malformed:
    """A line that is no document, and why; line 0 is the file itself."""

    line: int
    reason: str


class DamagedText(ValueError):
    """A plain text file that turns out not to be text, perhaps far behind its beginning."""


def is_text(path: str) -> bool:
    """Whether the whole file is one document: .txt, and names without a known suffix (a file given by itself)."""
    return not path.endswith((".jsonl", ".json", ".gz", ".zst", ".parquet"))


def scan(path: Path) -> list[Piece]:
    """The pieces of a file; none of an empty one. Reads every byte once, at the speed of the checksum."""
    name = str(path)
    cut_size = PIECE_BYTES if name.endswith((".jsonl", ".json")) else sys.maxsize
    pieces: list[Piece] = []
    start = line = 0
    with path.open("rb") as file:
        mtime_ns = os.fstat(file.fileno()).st_mtime_ns
        while True:
            digest, size, lines = hashlib.sha256(), 0, 0
            while size < cut_size and (block := file.read(min(1 << 20, cut_size - size))):
                digest.update(block)
                size += len(block)
                lines += block.count(b"\n")
            while size >= cut_size and (block := file.readline(1 << 20)):  # on to the end of the line
                digest.update(block)
                size += len(block)
                if block.endswith(b"\n"):
                    lines += 1
                    break
            if not size:
                return pieces
            pieces.append(Piece(name, start, start + size, line, digest.hexdigest(), mtime_ns))
            start, line = start + size, line + lines


def read_text(path: Path) -> str:
    """A plain text file as one string; ValueError where it is empty or not text."""
    try:
        text = "".join(_read_text(_whole(path), lambda num_bytes: None))
    except DamagedText as error:
        raise ValueError(f"{path} is {error}; convert it to UTF-8 or leave it out.") from None
    if not text:
        raise ValueError(f"{path} is empty; put text into it or leave it out.")
    return text


def sample_texts(files: Sequence[Path], characters: int = 1 << 28) -> Iterator[str]:
    """Text from the beginning of every file, to its share of `characters` by size: what a tokenizer is trained on."""
    sizes = {file: file.stat().st_size for file in files}
    total = max(1, sum(sizes.values()))
    for file, size in sizes.items():
        budget = max(1, characters * size // total)
        try:
            for item in read(_whole(file)):
                for part in item.parts if isinstance(item, Document) else ():
                    yield part[:budget]
                    budget -= len(part)
                    if budget <= 0:
                        break
                if budget <= 0:
                    break
        except DamagedText:
            continue  # which `prepare` will report


def _whole(file: Path) -> Piece:
    status = file.stat()
    return Piece(str(file), 0, status.st_size, 0, "", status.st_mtime_ns)


def read(piece: Piece, progress: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Document | Malformed]:
    """The documents of a piece in order; `progress` is told how many of its bytes were read since the last call."""
    if piece.path.endswith(".parquet"):
        yield from _read_parquet(piece, progress)
    elif is_text(piece.path):
        yield Document(1, _read_text(piece, progress))
    else:
        yield from _read_jsonl(piece, progress)


# -- JSONL ------------------------------------------------------------------------------------------------------------


def _read_jsonl(piece: Piece, progress: Callable[[int], None]) -> Iterator[Document | Malformed]:
    number = piece.line
    with open(piece.path, "rb") as raw:
        raw.seek(piece.start)
        lines = _decompressed(raw, piece.path)
        position = piece.start
        while raw is not lines or raw.tell() < piece.stop:
            number += 1
            try:
                parts = _next_text(lines, is_first=number == 1)
            except _damage(piece.path) as error:
                yield Malformed(number, f"the file is damaged: {error}")
                return
            except ValueError as error:
                parts = None
                yield Malformed(number, str(error))
            except EndOfFile:
                return
            finally:
                progress(raw.tell() - position)
                position = raw.tell()
            if parts is not None:
                yield Document(number, parts)


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSONL file that are not blank, with their numbers from 1; ValueError where it is damaged."""
    with path.open("rb") as raw:
        try:
            for number, line in enumerate(_decompressed(raw, str(path)), start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line
        except _damage(str(path)) as error:
            raise ValueError(f"{path}: the file is damaged: {error}") from None


def _damage(path: str) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    return (OSError, EOFError, zlib.error, *((zstd_module().ZstdError,) if path.endswith(".zst") else ()))


class EndOfFile(Exception):
    """No line follows."""


def _next_text(lines: IO[bytes], is_first: bool) -> Iterable[str] | None:
    """The text of the next line in parts, None of a blank one; ValueError says why there is none."""
    line = lines.readline(_LARGE_LINE_BYTES)
    if not line:
        raise EndOfFile
    is_whole = len(line) < _LARGE_LINE_BYTES or line.endswith(b"\n")
    if is_first:
        line = line.removeprefix(codecs.BOM_UTF8)  # as Python's utf-8-sig does for plain text
    if is_whole:
        return (_text_of(parse_record(line)),) if line.strip() else None
    with _one_large_line:
        line += lines.readline(MAX_LINE_BYTES - len(line))
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := lines.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            raise ValueError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
        # as bytes: one emoji makes a str of four bytes a character
        return _decoded(_text_of(parse_record(line)).encode())


def _decoded(text: bytes) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _PART_CHARACTERS):
        yield decoder.decode(text[start : start + _PART_CHARACTERS])


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        return zstd_module().open(raw)
    return raw


def zstd_module() -> Any:
    """Python 3.14's module for zstd, or its backport."""
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError:
        raise ImportError("reading .zst needs backports.zstd: pip install 'oncelm[data]'") from None


def parse_record(line: bytes) -> Any:
    """What a line of JSON holds, null for the NaN and Infinity that Python writes; ValueError says what is wrong."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason = f"not JSON: {error}"
    if b"NaN" in line or b"Infinity" in line:
        try:
            return orjson.loads(_NO_NUMBER.sub(lambda found: found[0] if found[1] else b"null", line))
        except orjson.JSONDecodeError:
            pass  # told as it was found first
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte {line[error.start]:#04x} at offset {error.start} of the line"
    raise ValueError(reason)


def _text_of(record: Any) -> str:
    """The text of one JSON object; ValueError where there is none to train on."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, got {type(record).__name__}")
    empty = None
    for field in TEXT_FIELDS:
        if field in record:
            if not _is_empty(value := record[field]):
                return _checked(field, value)
            empty = empty or field
    if empty is None:
        raise ValueError(f"no {' or '.join(TEXT_FIELDS)} among its keys ({', '.join(map(printable, record))[:60]})")
    return _checked(empty, record[empty])


def _is_empty(value: Any) -> bool:
    """Whether another field may have the text."""
    return value is None or value == "" or value == []


def _checked(field: str, text: Any) -> str:
    if field == "raw_content_lines" and isinstance(text, list) and all(isinstance(line, str) for line in text):
        text = "\n".join(text)
    if isinstance(text, bytes):
        raise ValueError(f"{field} is binary; make the column one of text (string)")
    if not isinstance(text, str):
        raise ValueError(f"{field} must be text, got {type(text).__name__}")
    if not text:
        raise ValueError(f"{field} is empty")
    return text


# -- Parquet and plain text -------------------------------------------------------------------------------------------


def _read_parquet(piece: Piece, progress: Callable[[int], None]) -> Iterator[Document | Malformed]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError("reading .parquet needs pyarrow: pip install 'oncelm[data]'") from None
    row = 0
    try:
        # a part of a row group at a time, and few rows: documents may be of megabytes
        with parquet.ParquetFile(piece.path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            fields = [field for field in TEXT_FIELDS if field in names]
            if not fields:
                yield Malformed(0, f"no column {' or '.join(TEXT_FIELDS)} among {', '.join(names)[:60]}")
                return
            num_rows, told = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=8, columns=fields, use_threads=False):
                for place, cell in enumerate(batch.column(fields[0])):
                    row += 1
                    record = {fields[0]: cell.as_py()}
                    if _is_empty(record[fields[0]]):
                        record |= {field: batch.column(field)[place].as_py() for field in fields[1:]}
                    try:
                        yield Document(row, (_text_of(record),))
                    except ValueError as error:
                        yield Malformed(row, str(error))
                progress(piece.stop * row // num_rows - told)
                told = piece.stop * row // num_rows
    except (pyarrow.ArrowException, OSError) as error:
        yield Malformed(row + 1 if row else 0, f"the file is damaged: {' '.join(str(error).split())[:120]}")


def _read_text(piece: Piece, progress: Callable[[int], None]) -> Iterator[str]:
    """UTF-8, with line breaks as `\\n`, without byte order mark: as Python reads text files."""
    with open(piece.path, encoding="utf-8-sig") as file:
        told = 0
        while True:
            try:
                part = file.read(_PART_CHARACTERS)
            except UnicodeDecodeError as error:
                raise DamagedText(f"not UTF-8 text: {_first_bad_byte(piece.path)}") from error
            position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
            progress(position - told)
            told = position
            if not part:
                return
            yield part


def _first_bad_byte(path: str) -> str:
    """The first byte of a file that is not UTF-8, in words; memory stays small."""
    offset = 0
    with open(path, "rb") as file:
        rest = b""
        while block := file.read(1 << 20):
            data = rest + block
            try:
                data.decode("utf-8")
                rest = b""
            except UnicodeDecodeError as error:
                if error.end < len(data) or error.reason != "unexpected end of data":
                    return f"byte {data[error.start]:#04x} at offset {offset + error.start}"
                rest = data[error.start :]
            offset += len(data) - len(rest)
    return f"a character is cut off at offset {offset}"
