"""Public-domain texts that ship with the package, so that examples and tests need no download.

Each corpus is one xz-compressed plain-text file: a header line `=== year | title`, then the text of that
document, and so on. `NOTICE` at the root of the repository names the sources and their licences.
"""

from __future__ import annotations

import io
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from oncelm.utils.errors import check_choice

CORPORA: dict[str, str] = {
    "sotu": "State of the Union addresses, 1790-2021, in the order they were given (one document each)",
    "moby_dick": "Moby-Dick by Herman Melville, 1851, in reading order (one document per chapter)",
}

_HEAD = re.compile(r"=== (\d{4}) \| (.+)\n")


@dataclass(frozen=True)
class CorpusText:
    """One text: an address (`title` is the president) or a chapter (`title` is its heading)."""

    year: int
    title: str
    text: str


def iterate_corpus(name: str) -> Iterator[CorpusText]:
    """The documents of a bundled corpus, in order; what comes later is not unpacked yet."""
    check_choice("corpus", name, CORPORA)
    with (
        files(__package__).joinpath(f"{name}.txt.xz").open("rb") as packed,
        io.TextIOWrapper(lzma.open(packed), encoding="utf-8", newline="\n") as lines,
    ):
        head = _HEAD.fullmatch(next(lines))
        body: list[str] = []
        for line in lines:
            if found := _HEAD.fullmatch(line):
                yield _document(head, body)
                head, body = found, []
            else:
                body.append(line)
        yield _document(head, body)


def _document(head: re.Match[str] | None, body: list[str]) -> CorpusText:
    assert head is not None  # a corpus starts with a header
    return CorpusText(int(head[1]), head[2], "".join(body).removesuffix("\n"))


def load_corpus(name: str, *, first_year: int | None = None, last_year: int | None = None) -> list[CorpusText]:
    """The documents of a bundled corpus, in order; years are inclusive bounds.

    >>> train = load_corpus("sotu", last_year=1999)
    >>> held_out = load_corpus("sotu", first_year=2000)
    >>> train[0].year, train[0].title, held_out[-1].title
    (1790, 'George Washington', 'Joseph R. Biden')
    """
    documents = list(iterate_corpus(name))
    low, high = documents[0].year, documents[-1].year
    chosen = [d for d in documents if (first_year or low) <= d.year <= (last_year or high)]
    if not chosen:
        raise ValueError(
            f"no document of corpus {name!r} has first_year={first_year} <= year <= last_year={last_year}; "
            f"its years run from {low} to {high}."
        )
    return chosen
