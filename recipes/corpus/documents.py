"""Debian documentation packages, Python wheels and the Linux kernel as long plain-text documents."""

from __future__ import annotations

import bz2
import email.parser
import gzip
import hashlib
import lzma
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from selectolax.lexbor import LexborHTMLParser

OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKUP = {".html", ".htm", ".xhtml", ".page", ".xml"}
PLAIN = {".txt", ".rst", ".md", ".pod", ".adoc", ".info", ".text"}
# Pages that repeat what other pages say, or say nothing: indices, source listings, translations, change logs.
UNWANTED_PAGES = re.compile(
    r"/_modules/|/_sources/|/src/|\.rs\.html|genindex|py-modindex|/search\.|-index\.html|changelog|/copyright"
    r"|/locale|/NEWS|/graphviz|-members\.html|_source\.html",
    re.IGNORECASE,
)
# What surrounds a page's text: navigation, scripts, tables of contents.
SURROUNDINGS = (
    "script,style,nav,header,footer,noscript,svg,button,form,.sphinxsidebar,.related,.navheader,.navfooter,"
    ".sidebar,.headerlink,.toc,.toctree-wrapper,.viewcode-link"
)
BLOCKS = "p,li,dd,dt,h1,h2,h3,h4,h5,h6,pre,tr,div,blockquote,br"
COMMON_WORDS = {
    *("the", "of", "and", "to", "a", "in", "is", "that", "for", "it", "as", "with", "be", "on", "by", "this", "are"),
    *("or", "an", "from", "which", "not", "can", "if", "you", "at", "will", "when", "has", "have"),
}
CODE = (".py", ".pyx", ".md", ".rst")
KERNEL_CODE = (".c", ".h", ".S", ".rst", ".txt", ".py")
CODE_BYTES = range(40, 300_000)  # of a file; a larger one is generated
LONGEST_LINE = 2000  # of code; a file with a longer one is minified, or a table of data


@dataclass(frozen=True)
class Document:
    text: str
    files: int  # it was made of
    licence: str  # as the package states it


def debian_document(folder: Path) -> Document:
    """The English pages below `folder` in the order of their paths; a paragraph seen before is left out."""
    pages = []
    seen: set[bytes] = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        if UNWANTED_PAGES.search(path.as_posix()):
            continue
        text = page_text(path)
        if not is_english(text):
            continue
        page = "\n\n".join(new_paragraphs(text, seen)).strip()
        if len(page) > 400:
            pages.append(page)
    licences = sorted(folder.glob("usr/share/doc/*/copyright"))
    licence = licences[0].read_text(encoding="utf-8", errors="replace") if licences else "unknown"
    return Document("\n\n\n".join(pages), len(pages), licence)


def page_text(path: Path) -> str:
    """The text of one page, or "" where it is of no kind that is read."""
    open_file = OPENERS.get(path.suffix)
    inner = path.with_suffix("") if open_file else path
    kind = inner.suffix.lower()
    is_info_part = re.search(r"\.info-\d+$", inner.name) is not None
    if kind not in MARKUP | PLAIN and not is_info_part:
        return ""
    with (open_file or open)(path, "rb") as file:
        raw = file.read()
    text = html_text(raw) if kind in MARKUP else raw.decode("utf-8", "replace")
    text = re.sub(r"[\x1f\x0c]", "\n", text)
    text = re.sub(r"[ \t\xa0]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def html_text(raw: bytes) -> str:
    tree = LexborHTMLParser(raw)
    for node in tree.css(SURROUNDINGS):
        node.decompose()
    body = tree.css_first("main") or tree.css_first("div[role=main]") or tree.body
    if body is None:
        return ""
    for node in body.css(BLOCKS):
        node.insert_before("\n")
    return body.text(separator="")


def is_english(text: str) -> bool:
    """Whether the text's beginning looks like English prose."""
    words = re.findall(r"[a-z]+", text[:20_000].lower())
    start = text[:5_000]
    return (
        len(words) >= 80
        and sum(word in COMMON_WORDS for word in words) > 0.12 * len(words)
        and sum(character < "\x7f" for character in start) > 0.95 * len(start)
    )


def new_paragraphs(text: str, seen: set[bytes]) -> Iterator[str]:
    """The paragraphs of `text` that are not in `seen`, which takes them in; short ones may repeat."""
    for paragraph in text.split("\n\n"):
        squeezed = re.sub(r"\s+", " ", paragraph).encode("utf-8", "replace")
        digest = hashlib.blake2b(squeezed, digest_size=8).digest()
        if len(paragraph) > 40 and digest in seen:
            continue
        seen.add(digest)
        yield paragraph


def wheel_document(wheel: Path) -> Document:
    """The code and prose of a wheel, each file under a line `# FILE: path`, in the order of the paths."""
    parts = []
    seen: set[bytes] = set()
    with zipfile.ZipFile(wheel) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            wanted = info.filename.endswith(CODE) and ".dist-info/" not in info.filename
            if wanted and info.file_size in CODE_BYTES and (part := code_file(info.filename, archive.read(info), seen)):
                parts.append(part)
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        licence = wheel_licence(archive.read(metadata).decode("utf-8", "replace"))
    return Document("\n".join(parts), len(parts), licence)


def code_file(path: str, raw: bytes, seen: set[bytes]) -> str | None:
    """A file under its path; None for one seen before, which `seen` knows by its checksum, and for data."""
    digest = hashlib.sha256(raw).digest()
    text = raw.decode("utf-8", "replace").rstrip()
    if digest in seen or max(map(len, text.split("\n"))) > LONGEST_LINE:
        return None
    seen.add(digest)
    return f"# FILE: {path}\n{text}\n"


def kernel_documents(folder: Path) -> list[Document]:
    """The kernel's sources: one document a directory of the second level, such as fs/ext4."""
    parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen: set[bytes] = set()
    with tarfile.open(next(folder.glob("usr/src/*.tar.*"))) as archive:
        for member in archive:
            _, _, path = member.name.partition("/")
            if not member.isreg() or not path.endswith(KERNEL_CODE) or member.size not in CODE_BYTES:
                continue
            file = archive.extractfile(member)
            if file is not None and (part := code_file(path, file.read(), seen)):
                parts["/".join(path.split("/")[:-1][:2])].append((path, part))
    groups = [[part for _, part in sorted(parts[name])] for name in sorted(parts)]
    return [Document("\n".join(group), len(group), "GPL-2.0; files may say otherwise") for group in groups]


def wheel_licence(metadata: str) -> str:
    fields = email.parser.HeaderParser().parsestr(metadata)
    classifiers = [
        c.removeprefix("License :: ") for c in fields.get_all("Classifier", []) if c.startswith("License ::")
    ]
    stated = fields.get("License-Expression") or "; ".join(classifiers) or fields.get("License") or "unknown"
    return stated.strip()
