"""The tokenizer that a run's settings name, and a check that it fits the model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from oncelm.data.bpe import make_bpe
from oncelm.data.layout import find_corpus
from oncelm.data.tokenizers import load_tokenizer
from oncelm.data.tokens import is_token_folder
from oncelm.train.claim import claim, run_lock
from oncelm.train.config import TrainConfig
from oncelm.train.parallel.mesh import Mesh
from oncelm.utils.vocabulary import bpe_size


def make_tokenizer(config: TrainConfig, mesh: Mesh | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer the settings name; one made from the data is kept in `out/tokenizer` to resume with."""
    if config.tokenizer is None and is_token_folder(config.data):
        return load_tokenizer(Path(config.data) / "tokenizer")
    if config.tokenizer is None:
        return load_tokenizer(config.model if Path(config.model).is_dir() else "bytes")
    size = bpe_size(config.tokenizer)
    if size is None:
        return load_tokenizer(config.tokenizer)
    kept = Path(config.out) / "tokenizer"

    def make() -> None:
        if not (config.resume and kept.exists()):
            corpus, lock = find_corpus(config.data), run_lock(kept.parent)
            claim(lock)  # a run that goes on there would be resumed with this tokenizer
            try:
                make_bpe(kept, corpus, size)
            finally:
                lock.release()

    make() if mesh is None else mesh.on_main(make)
    return load_tokenizer(kept)


def check_tokenizer(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where the model is a folder whose own tokenizer has other tokens; added ones may differ."""
    if not Path(config.model).is_dir():
        return
    try:
        own = load_tokenizer(config.model)
    except (ValueError, ImportError):  # there is none, or none that could be compared
        return
    added = own.get_added_vocab().keys() | tokenizer.get_added_vocab().keys()
    known, given = (
        {token: index for token, index in one.get_vocab().items() if token not in added} for one in (own, tokenizer)
    )
    if known != given:
        prepared = config.tokenizer is None and is_token_folder(config.data)
        source = f"data {config.data!r} was prepared with" if prepared else f"tokenizer {config.tokenizer!r} has"
        remedy = f"prepare the text again with --tokenizer {config.model}" if prepared else "leave tokenizer out"
        raise ValueError(
            f"{source} other tokens ({len(given):,}) than model {config.model!r} was trained on ({len(known):,}); "
            f"{remedy}, or start from a preset."
        )
