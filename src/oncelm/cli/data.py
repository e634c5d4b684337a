"""`oncelm data`: text to tokens, and a look at what a training run will see."""

from __future__ import annotations

import argparse
import sys
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from oncelm.cli.output import new_table, print_tables
from oncelm.utils.files import check_place

if TYPE_CHECKING:
    from oncelm.data.layout import Corpus
    from oncelm.data.tokens import ShardStream, TokenFolder

DESCRIPTION = """\
prepare   tokenizes DATA into memory-mapped shards, one thread a core. Stopped or killed at any moment, the same command
          goes on where it was; text that has not changed is never tokenized again. `oncelm train DATA` does the same
          by itself; prepare first where the machine with the GPU should not wait, or should not have the text.
info      describes text, or prepared tokens: sources, shares, documents, lengths, what was malformed.
sample    prints sequences exactly as training will see them, for a seed and a step.
check     reads all of a folder of prepared tokens and names what is damaged there; `prepare` makes it again.

DATA is
  a text file, or a folder of .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files at any depth
      a .txt file is one document; a line of JSONL is one, {"text": ...}, also "content" or "raw_content_lines" (a list)
  a corpus folder, whose sources are mixed by weight
      DATA/json/train.json   [{"name": "books", "weight": 3}, {"name": "code", "weight": 1}]
      DATA/json/books.json   ["shards/books-0.jsonl", "shards/books-1.jsonl.zst"]
      DATA/json/valid.json   as train.json, measured on and never trained on (may be absent)
  for info, sample and check also a folder of prepared tokens

examples:
  oncelm data prepare corpus --tokenizer cl100k_base
      tokens go to corpus/.oncelm, where `oncelm train corpus --tokenizer cl100k_base` finds them
  oncelm data prepare corpus --tokenizer bpe:32768 --out tokens
      a tokenizer made from the text; `oncelm train tokens` needs nothing but that folder
  oncelm data prepare corpus --strict
      stop at the first malformed line, told as file:line with the reason
  oncelm data info tokens
  oncelm data sample tokens --seq-len 512 --step 1000 --count 2
  oncelm data check tokens
      exit 1 where a file is damaged
"""

LENGTHS = (4_096, 65_536, 1_048_576)  # tokens in a document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("prepare", "info", "sample", "check"), help="what to do (see above)")
    parser.add_argument("data", metavar="DATA", help="text, a corpus, or prepared tokens")
    prepare = parser.add_argument_group("prepare")
    prepare.add_argument("--tokenizer", help="bytes, cl100k_base, bpe:SIZE or a path (bytes)")
    prepare.add_argument("--out", metavar="DIR", help="folder of the tokens (.oncelm beside the text)")
    prepare.add_argument("--bos", action="store_true", help="start every document with the bos token")
    prepare.add_argument("--strict", action="store_true", help="stop at the first malformed line")
    prepare.add_argument("--workers", type=int, metavar="N", help="threads (one a core)")
    prepare.add_argument("--prune", action="store_true", help="then delete shards of text that is no longer there")
    sample = parser.add_argument_group("sample")
    sample.add_argument("--seq-len", type=int, default=512, metavar="T", help="tokens in a sequence (512)")
    sample.add_argument("--batch-size", type=int, default=8, metavar="B", help="sequences in a step (8)")
    sample.add_argument("--step", type=int, default=0, metavar="N", help="step to look at (0)")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the run (0)")
    sample.add_argument("--count", type=int, default=3, metavar="N", help="sequences to print, from the first (3)")
    sample.add_argument("--validation-fraction", type=float, default=0.05, metavar="X", help="held out (0.05)")
    sample.add_argument("--long-documents", type=int, metavar="T", help="as the setting of the same name")
    sample.add_argument("--long-factor", type=float, default=1.0, metavar="X", help="as the setting of the same name")


def run(args: argparse.Namespace) -> int:
    from oncelm.utils import constraints as allowed

    allowed.check_options(
        args,
        {
            **dict.fromkeys(("batch_size", "count"), allowed.Whole(1, 2**31)),
            **dict.fromkeys(("long_documents", "workers"), allowed.Whole(1)),
            **dict.fromkeys(("step", "seed"), allowed.Whole(0)),
            "seq_len": allowed.Whole(2, 2**31),
            "validation_fraction": allowed.Number(0, 1, open_high=True),
            "long_factor": allowed.Number(0, 1e6, open_low=True),
        },
    )
    actions = {"prepare": run_prepare, "info": run_info, "sample": run_sample, "check": run_check}
    return actions[args.action](args)


# -- prepare ----------------------------------------------------------------------------------------------------------


def run_prepare(args: argparse.Namespace) -> int:
    from oncelm.data.layout import find_corpus
    from oncelm.data.place import hidden_folder
    from oncelm.data.prepare import prepare, prune
    from oncelm.data.tokens import is_token_folder, open_tokens
    from oncelm.utils.units import size

    if is_token_folder(args.data):
        raise ValueError(f"{args.data!r} holds tokens already; give the text that they were made of.")
    corpus = find_corpus(args.data)
    check_place(args.out or hidden_folder(corpus), "--out")
    options = {"bos": args.bos, "strict": args.strict, "workers": args.workers, "check": True}
    folder = prepare(corpus, args.tokenizer or "bytes", args.out, **options)
    tokens = open_tokens(folder)
    report_malformed(tokens)
    report_left_out(corpus)
    if args.prune:
        print(f"freed {size(prune(folder))}")
    count = sum(source.stream.num_tokens for source in (*tokens.train, *tokens.valid))
    print(f"{count:,} tokens in {folder}. Next: oncelm train {folder} --out runs/first")
    return 0


def report_malformed(tokens: TokenFolder, shown: int = 5) -> None:
    malformed = tokens.manifest["malformed"]
    if malformed["count"]:
        print(f"left out {malformed['count']:,} malformed lines or files:", file=sys.stderr)
        for example in malformed["examples"][:shown]:
            print(f"  {example}", file=sys.stderr)
        if malformed["count"] > shown:
            print("  ...", file=sys.stderr)


def report_left_out(corpus: Corpus) -> None:
    if corpus.left_out:
        print(corpus.left_out, file=sys.stderr)


# -- info -------------------------------------------------------------------------------------------------------------


def run_info(args: argparse.Namespace) -> int:
    from oncelm.data.layout import find_corpus
    from oncelm.data.tokens import is_token_folder, open_tokens

    if is_token_folder(args.data):
        describe_tokens(open_tokens(args.data))
        return 0
    corpus = find_corpus(args.data)
    describe_text(corpus)
    report_left_out(corpus)
    prepared = find_prepared(corpus)
    for folder in prepared:
        describe_tokens(open_tokens(folder))
    if not prepared:
        print(f"Not tokenized yet; next: oncelm data prepare {args.data}")
    return 0


def find_prepared(corpus: Corpus) -> list[Path]:
    """The folders of tokens that are kept beside a corpus."""
    from oncelm.data.place import hidden_folder
    from oncelm.data.shards import MANIFEST

    prepared = sorted(manifest.parent for manifest in hidden_folder(corpus).glob(f"*/{MANIFEST}"))
    if corpus.path.is_file():
        prepared = [folder for folder in prepared if folder.name.startswith(f"{corpus.path.name}-")]
    return prepared


def describe_text(corpus: Corpus) -> None:
    from oncelm.utils.units import size

    table = new_table(str(corpus.path), "source", "to", "|share", "|files", "|size")
    for use, sources in (("train", corpus.train), ("measure", corpus.valid)):
        total = sum(source.weight for source in sources)
        for source in sources:
            num_bytes = sum(file.stat().st_size for file in source.files)
            share = f"{source.weight / total:.1%}"
            table.add_row(source.name, use, share, f"{len(source.files):,}", size(num_bytes))
    print_tables(table)


def describe_tokens(tokens: TokenFolder) -> None:
    from oncelm.utils.units import count, size

    table = new_table("Tokens", "source", "to", "|share", "|documents", "|tokens", "|longest", "|size")
    lengths = new_table(
        "Share of the tokens that are in documents of at least", "source", *(f"|{n:,}" for n in LENGTHS), ""
    )
    for use, sources in (("train", tokens.train), ("measure", tokens.valid)):
        total = sum(source.weight for source in sources)
        for source in sources:
            stream = source.stream
            table.add_row(
                source.name,
                use,
                f"{source.weight / total:.1%}",
                f"{sum(shard['documents'] for shard in stream.shards):,}",
                count(stream.num_tokens),
                count(max(shard["longest"] for shard in stream.shards)),
                size(stream.num_tokens * stream.dtype.itemsize),
            )
            shares = [inside / stream.num_tokens for inside in tokens_in_documents(stream)]
            lengths.add_row(source.name, *(f"{share:.1%}" for share in shares), "tokens")
    print(tokens.path)
    print_tables(table, lengths)
    report_malformed(tokens)


def tokens_in_documents(stream: ShardStream) -> list[int]:
    """How many tokens are in documents of at least each of LENGTHS."""
    import numpy as np

    counts = np.zeros(len(LENGTHS), dtype=np.int64)
    for shard in range(len(stream.shards)):
        lengths = np.diff(stream.document_ends(shard), prepend=0)
        counts += [lengths[lengths >= length].sum() for length in LENGTHS]
    return counts.tolist()


# -- check ------------------------------------------------------------------------------------------------------------


def run_check(args: argparse.Namespace) -> int:
    from oncelm.data.check import check_folder
    from oncelm.data.layout import find_corpus
    from oncelm.data.tokens import is_token_folder

    folders = [Path(args.data)] if is_token_folder(args.data) else find_prepared(find_corpus(args.data))
    if not folders:
        raise ValueError(f"{args.data!r} has no prepared tokens yet; make them: oncelm data prepare {args.data}")
    num_damaged = 0
    for folder in folders:
        findings = check_folder(folder)
        num_damaged += len(findings.damaged)
        for fault in findings.damaged:
            print(fault)
        if findings.without_checksums:
            print(
                f"{folder}: {len(findings.without_checksums)} files or shards of an earlier version have no checksums "
                f"(the first: {findings.without_checksums[0]}): only sizes, borders and the largest id were looked at. "
                "Prepare into a new folder to have checksums."
            )
        print(f"{folder}: {findings.num_shards:,} shards looked at, {len(findings.damaged):,} files damaged")
    if num_damaged:
        print("Next: run the same `oncelm data prepare` again; it makes anew what is damaged, and nothing else.")
    return 1 if num_damaged else 0


# -- sample -----------------------------------------------------------------------------------------------------------


def run_sample(args: argparse.Namespace) -> int:
    from oncelm.data.dataset import TokenDataset
    from oncelm.data.layout import find_corpus
    from oncelm.data.place import hidden_folder
    from oncelm.data.prepare import prepare
    from oncelm.data.tokenizers import load_tokenizer
    from oncelm.data.tokens import is_token_folder, open_tokens

    if is_token_folder(args.data):
        folder = Path(args.data)
    else:
        corpus = find_corpus(args.data)
        check_place(args.out or hidden_folder(corpus), "--out")
        folder = prepare(
            corpus, args.tokenizer or "bytes", args.out, bos=args.bos, strict=args.strict, workers=args.workers
        )
    tokens = open_tokens(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    dataset = TokenDataset(
        tokens.train,
        args.seq_len,
        seed=args.seed,
        validation=tokens.valid,
        validation_fraction=args.validation_fraction,
        long_documents=args.long_documents,
        long_factor=args.long_factor,
        document_masking=True,  # says where documents begin
    )
    batch = dataset.batch(args.step, args.batch_size, slice(0, args.count))
    borders = [*accumulate(batch.lengths or ())]
    for row, ids in enumerate(batch.tokens):
        blocks, block = dataset.locate(args.step * args.batch_size + row)
        start = row * args.seq_len
        inside = [border - start for border in borders if start < border < start + args.seq_len]
        print(f"--- step {args.step}, row {row}: {blocks.name}, tokens from {blocks.start(block):,}", end="")
        print(f"; documents begin at {', '.join(map(str, inside))}" if inside else "")
        print(tokenizer.decode(ids))
    return 0
