"""Documents that were prepared ahead: names for snapshots in a folder.

A name is a small file of its own beside those of the snapshots, NAME.document.json. What a document needs are its
snapshot's file and those that this stands on; other texts may stand on them too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock

from oncelm.engine.prefix.disk import Folder, is_snapshot
from oncelm.engine.prefix.header import Damaged, Header
from oncelm.engine.prefix.tree import BLOCK, Chain, encode, snapshot_key
from oncelm.utils.errors import unknown
from oncelm.utils.files import write_json

_SUFFIX = ".document.json"


@dataclass(frozen=True)
class Document:
    """A named snapshot.

    Attributes:
        model: folder or id, as it was named.
        fingerprint: of the model's files in the folder (`PrefixCache.fingerprint`).
        key: of its text, as hexadecimal digits.
        source: the file that it was read from.
    """

    name: str
    model: str
    fingerprint: str
    key: str
    num_tokens: int
    source: str


@dataclass(frozen=True)
class Kept:
    """What there is of a document.

    Attributes:
        line: the headers of its files, from its beginning; None where one of them is gone.
        num_bytes: of these files.
        last_used: seconds since 1970.
    """

    document: Document
    line: Sequence[Header] | None
    num_bytes: int = 0
    last_used: float = 0.0


def check_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(f"a document cannot be called {name!r}: without slashes, and no dot at its beginning.")
    return name


def write(path: Path, document: Document) -> None:
    """Write a document's name, in place of another document that had it."""
    write_json(path / f"{check_name(document.name)}{_SUFFIX}", asdict(document))


def find(path: Path, name: str) -> Document:
    """The document of this name; ValueError if there is none."""
    documents = {document.name: document for document in read_all(path)}
    if name not in documents:
        if not documents:
            raise ValueError(f"there are no documents in {path}; oncelm cache save puts some there.")
        raise unknown("document", name, documents)
    return documents[name]


def read_all(path: Path) -> list[Document]:
    """All of a folder, by name; files that say something else are left out."""
    found = []
    for file in sorted(path.glob(f"*{_SUFFIX}")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            document = Document(**{field.name: said[field.name] for field in fields(Document)})
            _check(document, file)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(document)
    return found


def _check(document: Document, file: Path) -> None:
    """Raise ValueError unless `write` could have written this: what it says becomes names of files."""
    texts = (document.name, document.model, document.fingerprint, document.key, document.source)
    if not all(isinstance(text, str) for text in texts) or type(document.num_tokens) is not int:
        raise ValueError(f"{file} has values of other types")
    bytes.fromhex(document.key)
    if file.name != f"{check_name(document.name)}{_SUFFIX}":
        raise ValueError(f"{file} is of a document called {document.name!r}")


def look(path: Path, documents: Sequence[Document]) -> list[Kept]:
    """What there is of each; headers alone are read."""
    folders = _folders(path, documents)
    kept = []
    for document in documents:
        folder = folders[document.fingerprint]
        line = _line(folder, bytes.fromhex(document.key))
        if line is None:
            kept.append(Kept(document, None))
            continue
        sizes = [folder.file_size(header.key) for header in line]
        kept.append(Kept(document, line, sum(sizes), folder.place(line[-1].key).stat().st_mtime))
    return kept


def tokens(path: Path, document: Document) -> list[int]:
    """The tokens of a document, without the original; ValueError where it is gone or damaged."""
    folder = _folders(path, [document])[document.fingerprint]
    line = _line(folder, bytes.fromhex(document.key))
    if line is None:
        raise ValueError(
            f"what was read of {document.name} is gone: it had to make room, or was deleted. Save it again."
        )
    found: list[int] = []
    try:
        for header in line:
            found += folder.tokens(header.key)
        n, chain = len(found), Chain(line[-1].root)
        if snapshot_key(chain.at(found, n // BLOCK), encode(found[n - n % BLOCK :])).hex() != document.key:
            raise Damaged("its tokens are not those that were read")
    except (Damaged, OSError) as error:
        raise ValueError(f"{document.name} is damaged: {error}. Save it again.") from error
    return found


def remove(path: Path, names: Sequence[str]) -> int:
    """Forget documents, with what was kept of them and of texts that go on behind them; returns the bytes freed.

    What other documents, or other texts, stand on stays.
    """
    removed = [find(path, name) for name in names]
    stay = {document.key for document in read_all(path) if document.name not in names}
    freed = 0
    with FileLock(path / ".lock"):  # nobody writes behind them meanwhile
        for document in removed:
            folder = _folders(path, [document])[document.fingerprint]
            parents = {key: header.parent for key, header in folder.headers.items()}
            lasting = {key for name in stay for key in _ancestors(parents, bytes.fromhex(name))}
            key = bytes.fromhex(document.key)
            line = _ancestors(parents, key)
            behind = [one for one in parents if key in _ancestors(parents, one) and one not in lasting]
            for one in sorted(behind, key=lambda one: -folder.headers[one].n):
                freed += _delete(folder, parents, one)
            for one in line[1:]:
                if one in lasting or one in parents.values():
                    break
                freed += _delete(folder, parents, one)
            (path / f"{document.name}{_SUFFIX}").unlink(missing_ok=True)
    return freed


def clear(path: Path) -> int:
    """Delete all documents and snapshots of a folder, of all models; returns the bytes freed."""
    freed = 0
    if path.is_dir():
        with FileLock(path / ".lock"):
            for file in path.iterdir():
                if file.name.endswith(_SUFFIX) or is_snapshot(file.name):
                    freed += file.stat().st_size
                    file.unlink()
    return freed


def _delete(folder: Folder, parents: dict[bytes, bytes], key: bytes) -> int:
    size = folder.file_size(key)
    folder.discard(key)
    parents.pop(key, None)
    return size


def _folders(path: Path, documents: Sequence[Document]) -> dict[str, Folder]:
    """The files of each model that some documents are of."""
    folders = {fingerprint: Folder(path, fingerprint) for fingerprint in {one.fingerprint for one in documents}}
    for folder in folders.values():
        folder.refresh()
    return folders


def _ancestors(parents: dict[bytes, bytes], key: bytes) -> list[bytes]:
    """A file and those that it stands on, as far as they are there."""
    found: list[bytes] = []
    while key in parents and len(found) <= len(parents):
        found.append(key)
        key = parents[key]
    return found


def _line(folder: Folder, key: bytes) -> list[Header] | None:
    """The headers of a text's files from its beginning; None where one of them is gone."""
    line = [folder.headers[one] for one in _ancestors({k: h.parent for k, h in folder.headers.items()}, key)]
    return line[::-1] if line and not line[-1].start else None
