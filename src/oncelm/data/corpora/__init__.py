"""Public-domain texts that ship with the package, so that examples and tests need no download.

Each corpus is one xz-compressed plain-text file: a header line `=== year | title`, then the text of that
document, and so on. `NOTICE` at the root of the repository names the sources and their licences.
"""

from __future__ import annotations

import lzma
import re
from dataclasses import dataclass
from importlib.resources import files

from oncelm.utils.errors import check_choice

CORPORA: dict[str, str] = {
    "sotu": "State of the Union addresses, 1790-2021, in the order they were given (one document each)",
    "moby_dick": "Moby-Dick by Herman Melville, 1851, in reading order (one document per chapter)",
}


@dataclass(frozen=True)
class Document:
    """One text: an address (`title` is the president) or a chapter (`title` is its heading)."""

    year: int
    title: str
    text: str


def load_corpus(name: str, *, first_year: int | None = None, last_year: int | None = None) -> list[Document]:
    """The documents of a bundled corpus, in order; years are inclusive bounds.

    >>> train = load_corpus("sotu", last_year=1999)
    >>> held_out = load_corpus("sotu", first_year=2000)
    >>> train[0].year, train[0].title, held_out[-1].title
    (1790, 'George Washington', 'Joseph R. Biden')
    """
    check_choice("corpus", name, CORPORA)
    plain = lzma.decompress(files(__package__).joinpath(f"{name}.txt.xz").read_bytes()).decode("utf-8")
    _, *fields = re.split(r"^=== (\d{4}) \| (.+)\n", plain, flags=re.MULTILINE)
    documents = [
        Document(int(year), title, text.removesuffix("\n"))
        for year, title, text in zip(fields[0::3], fields[1::3], fields[2::3], strict=True)
    ]
    low, high = documents[0].year, documents[-1].year
    chosen = [d for d in documents if (first_year or low) <= d.year <= (last_year or high)]
    if not chosen:
        raise ValueError(
            f"no document of corpus {name!r} has first_year={first_year} <= year <= last_year={last_year}; "
            f"its years run from {low} to {high}."
        )
    return chosen
