"""The bundled texts: complete, in order, clean, and small enough to ship."""

from importlib.resources import files

import pytest

from oncelm.data.corpora import CORPORA, load_corpus


def test_every_corpus_loads_and_together_they_are_small():
    compressed = sum(len(files("oncelm.data.corpora").joinpath(f"{name}.txt.xz").read_bytes()) for name in CORPORA)
    assert compressed < 3_500_000
    for name in CORPORA:
        documents = load_corpus(name)
        assert all(document.text == document.text.strip() != "" for document in documents)
        assert all(char >= " " or char == "\n" for document in documents for char in set(document.text))


def test_sotu_is_complete_and_in_order():
    documents = load_corpus("sotu")
    years = [document.year for document in documents]
    assert len(documents) == 233
    assert years == sorted(years)
    assert set(range(1790, 2022)) - set(years) == {1933}  # no address was given in that year
    assert 10_500_000 < sum(len(document.text) for document in documents) < 11_000_000
    assert len({document.text for document in documents}) == len(documents)
    assert documents[0].text.startswith("Fellow-Citizens of the Senate and House of Representatives:")


@pytest.mark.parametrize(
    ("year", "first", "second"),
    [(1953, "Harry S. Truman", "Dwight D. Eisenhower"), (1961, "Dwight D. Eisenhower", "John F. Kennedy")],
)
def test_the_outgoing_president_speaks_first(year: int, first: str, second: str):
    assert [document.title for document in load_corpus("sotu", first_year=year, last_year=year)] == [first, second]


def test_sotu_can_be_cut_by_year():
    train, held_out = load_corpus("sotu", last_year=1999), load_corpus("sotu", first_year=2000)
    assert train + held_out == load_corpus("sotu")
    assert train[-1].year == 1999
    assert (held_out[0].year, held_out[-1].year, len(held_out)) == (2000, 2021, 22)


def test_moby_dick_is_in_reading_order():
    chapters = load_corpus("moby_dick")
    assert len(chapters) == 138  # etymology, extracts, 135 chapters, epilogue
    assert [chapter.title.split(".")[0] for chapter in chapters[2:-1]] == [f"CHAPTER {i}" for i in range(1, 136)]
    assert chapters[2].text.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert chapters[-1].text.endswith("only found another orphan.")
    assert max(len(line) for line in chapters[2].text.split("\n")) > 500  # a paragraph is one line


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="unknown corpus 'mobydick'; did you mean 'moby_dick'"):
        load_corpus("mobydick")
    with pytest.raises(ValueError, match=r"first_year=2050.*from 1790 to 2021"):
        load_corpus("sotu", first_year=2050)
