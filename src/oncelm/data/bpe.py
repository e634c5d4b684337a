"""A tokenizer by its name, `bpe:SIZE` included, which is trained on the text and kept."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from oncelm.data.layout import Corpus
from oncelm.data.place import turn
from oncelm.data.reading import sample_texts
from oncelm.data.sealed import damaged_files, write_listing
from oncelm.data.tokenizers import load_tokenizer, train_bpe
from oncelm.utils.files import atomic_folder
from oncelm.utils.vocabulary import bpe_size


def make_bpe(folder: Path, corpus: Corpus, vocab_size: int) -> None:
    """Make a tokenizer from what the corpus trains on; it takes the place of one that is in `folder`."""
    files = [file for source in corpus.train for file in source.files]
    tokenizer = train_bpe(sample_texts(files), vocab_size)
    with atomic_folder(folder) as new:
        tokenizer.save_pretrained(new)
        write_listing(new)


def keep_bpe(folder: Path, corpus: Corpus, vocab_size: int) -> None:
    """Make a tokenizer where there is none: of several processes that want it at once the first does.

    Raises:
        ValueError: one that was made before is damaged.
    """
    if not folder.exists():
        with turn(folder.parent):
            if not folder.exists():
                make_bpe(folder, corpus, vocab_size)
    if damaged := damaged_files(folder):
        raise ValueError(f"{damaged[0]} is damaged; delete {str(folder)!r} to have it made from the text again.")


def corpus_tokenizer(name: str, corpus: Corpus, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of that name (`load_tokenizer`); "bpe:SIZE" is made from the corpus once, and kept in `folder`."""
    size = bpe_size(name)
    if size is None:
        return load_tokenizer(name)
    kept = folder / f"bpe-{size}"
    keep_bpe(kept, corpus, size)
    return load_tokenizer(kept)
