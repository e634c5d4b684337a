"""A corpus to token shards on disk: in parallel, restartable at any moment; unchanged text is not tokenized again.

    corpus -> units, each the text of a shard (units.py) -> the shards that are missing (making.py) -> tokens.json

The result is a folder of tokens; `oncelm.data.shards` says what lies in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from oncelm.data.bpe import corpus_tokenizer
from oncelm.data.encoding import Encoder
from oncelm.data.layout import Corpus, Source, find_corpus
from oncelm.data.making import KEPT_EXAMPLES, MalformedLine, Problem, make_shards
from oncelm.data.place import default_folder, hidden_folder, turn
from oncelm.data.reading import Piece
from oncelm.data.sealed import damaged_files, unless_damaged, write_listing, write_sealed
from oncelm.data.shards import FILE_NAME, FORMAT, MANIFEST, ShardInfo, find_info, manifest_entry, read_info, token_dtype
from oncelm.data.tokens import read_manifest, shard_entries
from oncelm.data.units import Unit, find_missing, scan_all, units_of
from oncelm.utils.environment import usable_cores
from oncelm.utils.errors import check_positive
from oncelm.utils.files import atomic_folder, clean_up


def prepare(
    corpus: Corpus | str | Path,
    tokenizer: PreTrainedTokenizerBase | str,
    folder: str | Path | None = None,
    *,
    bos: bool = False,
    strict: bool = False,
    workers: int | None = None,
    check: bool = False,
) -> Path:
    """Tokenize what is not yet, and return the folder of the result (see `oncelm.data.tokens.open_tokens`).

    Killed at any moment, it goes on from the last complete shard; two at a time on one folder take turns.
    Progress bars appear when it takes longer than two seconds.

    Args:
        corpus: text: a file, a folder, a corpus with json/train.json (`find_corpus`).
        tokenizer: any of Hugging Face's, with an eos token, or its name; "bpe:4096" is made from the text, and kept
            beside its tokens.
        folder: of the result; None: `.oncelm/<tokenizer>` beside the text.
        bos: start every document with the tokenizer's bos token.
        strict: a malformed line is an error (the first in the corpus's order), instead of counted and left out.
        workers: threads that encode, each with up to about 30 MB in hand; None: one a core.
        check: look for damage in all shards that are there, which are then made again; else only as much as
            `open_tokens` does, which is all of a small folder.

    Raises:
        ValueError: a source without any document, a tokenizer without eos, a malformed line with `strict`; a `folder`
            that is the text's.
        OSError: a file cannot be written. Complete shards are kept.
    """
    corpus = corpus if isinstance(corpus, Corpus) else find_corpus(corpus)
    if isinstance(tokenizer, str):
        tokenizer = corpus_tokenizer(tokenizer, corpus, hidden_folder(corpus) if folder is None else Path(folder))
    encoder = Encoder(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos token to end every document with; set tokenizer.eos_token.")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos token; leave bos out or set tokenizer.bos_token.")
    workers = usable_cores() if workers is None else workers
    check_positive(workers=workers)
    fingerprint = encoder.fingerprint()
    out = default_folder(corpus, fingerprint) if folder is None else Path(folder)
    if out.resolve() == corpus.path.resolve():
        raise ValueError(f"folder {str(out)!r} is the text's own; name another for its tokens.")
    shards = out / "shards"
    with turn(out):
        shards.mkdir(exist_ok=True)
        clean_up(out)  # nobody else is here
        clean_up(shards)
        pieces = scan_all(corpus, out, workers)
        units = {source: units_of(source, pieces, f"{FORMAT} {fingerprint} {bos}") for source in corpus.sources}
        try:
            every = [unit for group in units.values() for unit in group]
            missing = find_missing(every, shards, token_dtype(encoder.vocab_size), check)
            make_shards(missing, shards, encoder, bos, strict, workers)
        except MalformedLine as error:  # the first of the shards made now: in one made before may be an earlier one
            for source, group in units.items():
                made = [(unit, info) for unit in group if (info := find_info(shards, unit.key)) is not None]
                if problems := _problems(source, made, pieces, error.problem):
                    raise MalformedLine(problems[0]) from None
            raise
        _write_manifest(corpus, units, pieces, out, encoder, fingerprint, bos, strict)
    return out


def prune(folder: Path) -> int:
    """Delete the shards that FOLDER/tokens.json does not name (of text or a tokenizer since replaced); bytes freed."""
    with turn(folder):
        used = shard_entries(read_manifest(folder)[0])
        named = ((FILE_NAME.fullmatch(file.name), file) for file in (folder / "shards").iterdir())
        stale = [file for name, file in named if name and name[1] not in used]
        freed = sum(file.stat().st_size for file in stale)
        for file in stale:
            file.unlink()
    return freed


def _problems(
    source: Source,
    made: Sequence[tuple[Unit, ShardInfo]],
    pieces: dict[Path, list[Piece]],
    more: Problem | None = None,
) -> list[Problem]:
    """What is malformed in a source, in the order of its files: in shards that are made, and `more` if it is in it."""
    order = {str(file): number for number, file in enumerate(source.files)}
    found = [Problem(str(file), 0, "the file is empty") for file in source.files if not pieces[file]]
    for unit, info in made:
        for number, line, reason in info.malformed:
            piece = unit.pieces[number]
            found.append(Problem(piece.path, piece.line + line if line else 0, reason))
    if more and more.path in order:
        found.append(more)
    return sorted(found, key=lambda problem: (order[problem.path], problem.line))


def _write_manifest(
    corpus: Corpus,
    units: dict[Source, list[Unit]],
    pieces: dict[Path, list[Piece]],
    out: Path,
    encoder: Encoder,
    fingerprint: str,
    bos: bool,
    strict: bool,
) -> None:
    count = 0
    examples: list[Problem] = []
    described: dict[Source, dict[str, Any]] = {}
    for source, group in units.items():
        made = [(unit, read_info(out / "shards", unit.key)) for unit in group]
        problems = _problems(source, made, pieces)
        count += sum(not pieces[file] for file in source.files)
        shards = []
        for unit, info in made:
            shards.append(manifest_entry(unit.key, info))
            count += info.num_malformed
        if strict and problems:
            raise MalformedLine(problems[0])
        if not any(shard["documents"] for shard in shards):
            reason = f"the first problem: {problems[0]}" if problems else "every line of them is blank"
            raise ValueError(f"source {source.name!r} has no document in its {len(source.files)} file(s); {reason}.")
        examples += problems[: KEPT_EXAMPLES - len(examples)]
        described[source] = {"name": source.name, "weight": source.weight, "shards": shards}
    manifest = {
        "format": FORMAT,
        "tokenizer": fingerprint,
        "vocab_size": encoder.vocab_size,
        "bos": bos,
        "train": [described[source] for source in corpus.train],
        "valid": [described[source] for source in corpus.valid],
        "malformed": {"count": count, "examples": list(map(str, examples))},
    }
    # leave alone what other runs may be reading, unless it changed or was damaged
    if damaged_files(out / "tokenizer") != [] or unless_damaged(read_manifest, out) != (manifest, True):
        with atomic_folder(out / "tokenizer") as folder:
            encoder.tokenizer.save_pretrained(folder)
            write_listing(folder)
        write_sealed(out / MANIFEST, manifest)
