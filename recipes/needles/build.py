#!/usr/bin/env python3
"""Hide facts in real text and ask for them: rows of tokens from which a model learns to find needles.

    python recipes/needles/build.py TEXT DATA                       # drills, and rows of 2K and 32K tokens of text
    python recipes/needles/build.py TEXT DATA --tokens 4096:40M     # other rows: LENGTH:TOKENS, one or several
    oncelm data sample DATA/2048 --seq-len 2048                   # look at some
    oncelm train DATA/drill-64 --out runs/drill-64 --config recipes/needles/drill.yaml

TEXT is whatever `oncelm data` reads: .txt, .jsonl(.gz, .zst), a folder of them. 60 MB will do; leave out what is
measured on (State of the Union, Moby-Dick). The same command gives the same rows. Stopped, it goes on where it was.

    DATA/tokenizer/                 a BPE of 512 entries made of TEXT, unless --tokenizer names one
    DATA/text.tokens, words.json    TEXT in its tokens, and names found in it
    DATA/LENGTH/, DATA/drill-LENGTH/  folders of tokens for `oncelm train`, as `oncelm data prepare` makes them

Every row is a document that fills a sequence of the training exactly, so that no question is cut off from its needle.
That is why rows are tokens and not text; they are also joined as the evaluation joins its prompts, token to token.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from drills import Drills
from facts import FORMS, Names, other_forms
from rows import Rows
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from oncelm.data.encoding import Encoder
from oncelm.data.sealed import file_checksum
from oncelm.data.shards import (
    FORMAT,
    MANIFEST,
    ShardInfo,
    is_complete,
    manifest_entry,
    read_info,
    token_dtype,
    write_info,
)
from oncelm.data.tokenizers import load_tokenizer, train_bpe
from oncelm.eval.documents import Document, read_documents
from oncelm.utils.errors import check_positive
from oncelm.utils.files import atomic_file, atomic_folder, write_json

TOKENIZER_CHARACTERS = 16 << 20  # of text that the tokenizer is made of
HELD_OUT = 0.02  # of the text, from its end: for the rows that are validated on
VALIDATION_TOKENS = 1 << 20
SHARD_TOKENS = 1 << 21
MOST_WORDS = 20_000
SEEDS = {"train": 0, "valid": 1}
Opener = Callable[..., Drills | Rows]
VERSION = 2  # of what a row is, given its options: raise it with any change in drills.py, rows.py or facts.py


def tokens_of(text: str) -> tuple[int, int]:
    """(length, tokens) of LENGTH:TOKENS, as in 2048:50M.

    >>> tokens_of("2K:50M")
    (2048, 50000000)
    """
    found = re.fullmatch(r"(\d+)(K?):(\d+)([KMG]?)", text)
    if found is None or int(found[1]) * int(found[3]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be LENGTH:TOKENS, as in 2048:50M.")
    length = int(found[1]) * (1024 if found[2] else 1)
    return length, int(found[3]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[found[4]]


def make_tokenizer(documents: Sequence[Document], vocab_size: int, folder: Path) -> None:
    """A BPE of an equal share of every document; made without numbers, so that each digit stays a token."""
    share = min(1.0, TOKENIZER_CHARACTERS / sum(len(document.text) for document in documents))
    parts = (document.text[: round(share * len(document.text))] for document in documents)
    tokenizer = train_bpe((re.sub(r"\d+", " ", part) for part in parts), vocab_size)
    with atomic_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)


def encode_text(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, out: Path, workers: int) -> None:
    """All documents' ids, an eos behind each, one file; one thread a document."""
    encoder = Encoder(tokenizer)
    dtype = token_dtype(encoder.vocab_size)

    def encode(document: Document) -> bytes:
        parts = [np.asarray(ids, dtype) for ids in encoder.encode_long([document.text])]
        return np.concatenate([*parts, np.array([tokenizer.eos_token_id], dtype)]).tobytes()

    total = sum(len(document.text) for document in documents)
    with (
        atomic_file(out) as temporary,
        temporary.open("wb") as file,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, desc="text", unit="B", unit_scale=True) as bar,
    ):
        for document, ids in zip(documents, pool.map(encode, documents), strict=True):
            file.write(ids)
            bar.update(len(document.text))


def find_words(documents: Sequence[Document]) -> list[str]:
    """The commonest capitalized words, commonest first."""
    words: Counter[str] = Counter()
    for document in documents:
        words.update(re.findall(r"\b[A-Z][a-z]{2,}\b", document.text[: 4 << 20]))
    return [word for word, _ in words.most_common(MOST_WORDS)]


@functools.cache
def open_drills(data: Path, split: str, length: int, seed: int) -> Drills:
    """Drills, others for "train" than for "valid"; once in a process."""
    return Drills(load_tokenizer(data / "tokenizer"), length, 2 * seed + SEEDS[split])


@functools.cache
def open_rows(
    data: Path, split: str, length: int, seed: int, most_facts: int, plain_share: float, leave_out: str | None
) -> Rows:
    """Rows of the text's beginning ("train") or of what is held out of it ("valid"); once in a process."""
    tokenizer = load_tokenizer(data / "tokenizer")
    text = np.memmap(data / "text.tokens", token_dtype(Encoder(tokenizer).vocab_size), mode="r")
    border = min(round((1 - HELD_OUT) * len(text)), len(text) - length)
    part = text[:border] if split == "train" else text[border:]
    names = Names(json.loads((data / "words.json").read_text(encoding="utf-8")))
    forms = other_forms(leave_out)
    return Rows(part, tokenizer, names, length, most_facts, plain_share, 2 * seed + SEEDS[split], forms)


def make_shard(folder: Path, key: str, first: int, last: int, open_: Opener, options: tuple[Any, ...]) -> None:
    """Write rows `first` to `last` as a shard; its .json, which completes it, last."""
    made = open_(*options)
    rows = [made.row(number) for number in range(first, last)]
    tokens = np.concatenate(rows)
    with atomic_file(folder / f"{key}.tokens") as temporary:
        temporary.write_bytes(tokens.astype(token_dtype(made.vocab_size)).tobytes())
    with atomic_file(folder / f"{key}.documents") as temporary:
        temporary.write_bytes(np.cumsum([len(row) for row in rows]).astype("<i8").tobytes())
    info = ShardInfo(
        *(len(tokens), len(rows), made.length - 1, int(tokens.max())), num_malformed=0, malformed=[],
        checksums={suffix: file_checksum(folder / f"{key}.{suffix}") for suffix in ("tokens", "documents")},
    )  # fmt: skip
    write_info(folder, key, info)


def shards_of(tokens: int, length: int, settings: str) -> Iterator[tuple[str, int, int]]:
    """(key, first row, last row) of the shards of `tokens` tokens; the key says what is in them."""
    rows, in_shard = max(1, tokens // length), max(1, SHARD_TOKENS // length)
    for first in range(0, rows, in_shard):
        last = min(first + in_shard, rows)
        yield hashlib.sha256(f"{settings} {first} {last}".encode()).hexdigest()[:32], first, last


def read_text(args: argparse.Namespace) -> None:
    """What all rows are made of: the tokenizer, words and TEXT in tokens, unless they are there."""
    data: Path = args.data
    source = {"text": args.text, "tokenizer": args.tokenizer or f"bpe:{args.vocab_size}"}
    record = data / "source.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else source
    if before != source:
        raise ValueError(f"{data} was made of {before}, now it is {source}; choose another folder, or delete it.")
    write_json(record, source)
    if (data / "text.tokens").exists():  # made last
        return
    documents = list(tqdm(read_documents(args.text), desc="read", unit=" documents"))
    if not documents:
        raise ValueError(f"{args.text} holds no text.")
    if args.tokenizer is not None:
        load_tokenizer(args.tokenizer).save_pretrained(data / "tokenizer")
    elif not (data / "tokenizer").exists():
        make_tokenizer(documents, args.vocab_size, data / "tokenizer")
    write_json(data / "words.json", find_words(documents))
    encode_text(documents, load_tokenizer(data / "tokenizer"), data / "text.tokens", args.workers)


def make_rows(args: argparse.Namespace) -> None:
    """The folders of rows: the shards that are not there, in parallel, then the lists of them."""
    data: Path = args.data
    tokenizer = load_tokenizer(data / "tokenizer")
    encoder = Encoder(tokenizer)
    dtype = token_dtype(encoder.vocab_size)
    with (data / "text.tokens").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    wanted: list[tuple[str, Opener, int, int, tuple[Any, ...]]]  # folder, what makes its rows, length, tokens, options
    wanted = [(f"drill-{length}", open_drills, length, tokens, ()) for length, tokens in args.drill]
    for length, tokens in args.tokens:
        options = (args.facts or default_facts(length), args.plain_share, args.leave_out)
        wanted.append((str(length), open_rows, length, tokens, options))
    listed: dict[str, dict[str, list[str]]] = {}
    missing = []
    for name, open_, length, tokens, more in wanted:
        folder = data / name / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        listed[name] = {}
        for split, amount in (("train", tokens), ("valid", min(tokens // 10, VALIDATION_TOKENS))):
            full = (split, length, args.seed, *more)
            shards = list(shards_of(amount, length, f"{VERSION} {encoder.fingerprint()} {digest} {full}"))
            listed[name][split] = [key for key, _, _ in shards]
            missing += [
                (folder, *shard, open_, (data, *full)) for shard in shards if not is_complete(folder, shard[0], dtype)
            ]
    with (
        concurrent.futures.ProcessPoolExecutor(args.workers, initializer=without_threads) as pool,
        tqdm(total=len(missing), desc="rows", unit=" shards") as bar,
    ):
        try:
            tasks = [pool.submit(make_shard, *shard) for shard in missing]
            for task in concurrent.futures.as_completed(tasks):
                task.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for name, splits in listed.items():
        folder = data / name
        sources = {
            split: [{"name": split, "weight": 1.0, "shards": describe(folder / "shards", keys)}]
            for split, keys in splits.items()
        }
        tokenizer.save_pretrained(folder / "tokenizer")
        about = {"format": FORMAT, "tokenizer": encoder.fingerprint(), "vocab_size": encoder.vocab_size, "bos": False}
        write_json(folder / MANIFEST, about | sources | {"malformed": {"count": 0, "examples": []}})
        tokens = sum(shard["tokens"] for shard in sources["train"][0]["shards"])
        print(f"{folder}: {tokens / 1e6:,.1f}M tokens")


def without_threads() -> None:
    """In a worker: the tokenizer library would wait for threads that stayed in the process this one is a copy of."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def default_facts(length: int) -> int:
    """At most so many facts in a row: one in 96 tokens, and 192."""
    return min(max(2, length // 96), 192)


def describe(shards: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The shards as tokens.json lists them."""
    return [manifest_entry(key, read_info(shards, key)) for key in keys]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT", help="a file or folder of text")
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder to build")
    for option, default in (("drill", "64:16M 256:16M 1024:16M"), ("tokens", "2048:40M 32768:34M")):
        rows = "drills" if option == "drill" else "rows of text"
        parser.add_argument(
            f"--{option}",
            nargs="*",
            type=tokens_of,
            default=list(map(tokens_of, default.split())),
            metavar="LENGTH:TOKENS",
            help=f"length of the {rows}, and tokens in all of them ({default})",
        )
    parser.add_argument("--tokenizer", metavar="NAME", help="as of `oncelm train`, instead of a BPE made of TEXT")
    parser.add_argument("--vocab-size", type=int, default=512, help="of the BPE (%(default)s)")
    parser.add_argument("--facts", type=int, help="at most, in a row (one in 96 tokens, and 192)")
    parser.add_argument("--plain-share", type=float, default=0.1, help="of the rows, without facts (%(default)s)")
    parser.add_argument("--leave-out", metavar="WORDS", help="no sentences with these words, as 'pass key'")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    args = parser.parse_args(arguments)
    if args.facts is not None:
        check_positive(facts=args.facts)
    if not other_forms(args.leave_out):
        raise ValueError(
            f"--leave-out {args.leave_out!r} leaves none of the sentences {[form[0] for form in FORMS[1:]]}."
        )
    args.data.mkdir(parents=True, exist_ok=True)
    read_text(args)
    make_rows(args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: no worker is left behind
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"build.py: error: {error}")
