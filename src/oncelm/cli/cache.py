"""`oncelm cache`: read documents once, keep what was read on disk, and ask about them without reading them again."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oncelm.cli.inputs import read_text, typed_text
from oncelm.cli.options import add_options
from oncelm.cli.output import new_table, print_tables
from oncelm.utils.errors import unknown
from oncelm.utils.files import cache_folder, check_place

if TYPE_CHECKING:
    from oncelm.cli import Command
    from oncelm.engine.llm import LLM
    from oncelm.engine.prefix.documents import Kept

DESCRIPTION = """\
Documents that were read once, kept in a folder:

  save MODEL FILE...   read documents with a model and keep what was read
  list                 which documents there are
  load MODEL NAME      bring one into memory, checked byte by byte, and say how long that took; --ask about it
  rm NAME...           delete some, or --all

What is kept is the one global cache and the self-decoder's states at the document's end, so it belongs to one model
(its weights, its number format). It is found by content: whatever begins with the same text, given to `oncelm.LLM` with
cache_dir=DIR, goes on from there, whatever name it was saved under.

examples:
  oncelm cache save runs/book/model book.txt
      read a book once
  oncelm cache load runs/book/model book.txt --ask "And so it ended that"
      what follows, without reading the book again
  oncelm cache save yoco-3b/ handbook.txt --name handbook --kv-dtype float8 --cache-dir /data/documents
      under another name, in half of the bytes, in a folder of one's own
  oncelm cache list --json
  oncelm cache rm book.txt

`oncelm cache ACTION --help` tells of each one's options.
"""


BETWEEN_SNAPSHOTS = 65_536  # tokens: each has its own states, and what is wanted is the one at the end


def command(arguments: list[str]) -> Command:
    """What `oncelm cache ...` stands for: an action, or with none, an overview."""
    from oncelm.cli import Command

    actions = {
        "save": Command(SAVE, add_save_arguments, run_save),
        "list": Command(LIST, add_list_arguments, run_list),
        "load": Command(LOAD, add_load_arguments, run_load),
        "rm": Command(REMOVE, add_remove_arguments, run_remove),
    }
    words = [argument for argument in arguments if not argument.startswith("-")]
    if not words:
        return Command(DESCRIPTION, add_action, refuse_action)
    named = next((word for word in words if word in actions), words[0])
    if named not in actions:
        raise unknown("action of oncelm cache", named, actions)
    return actions[named]


def add_action(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="ACTION", help="save, list, load or rm (see above)")


def refuse_action(args: argparse.Namespace) -> None:
    raise unknown("action of oncelm cache", args.action, ("save", "list", "load", "rm"))


def add_shared(parser: argparse.ArgumentParser, of_model: bool = False) -> None:
    parser.add_argument("--cache-dir", metavar="DIR", help=f"folder of what is kept ({default_folder()})")
    if of_model:
        add_options(parser, "tokenizer", "device", "dtype")
        parser.add_argument(
            "--kv-dtype",
            default="auto",
            metavar="DTYPE",
            help="of the global cache, the same to save and load: auto (the model's), bfloat16, float8 or int8",
        )
        parser.add_argument(
            "--max-model-len", type=int, metavar="N", help="tokens at most (what the model was trained on)"
        )


def default_folder() -> Path:
    return cache_folder() / "documents"


def folder_of(args: argparse.Namespace) -> Path:
    return Path(args.cache_dir) if args.cache_dir is not None else default_folder()


def open_engine(args: argparse.Namespace, folder: Path) -> LLM:
    from oncelm.engine.llm import LLM

    options: dict[str, Any] = {"cache_dir": str(folder), "kv_cache_dtype": args.kv_dtype, "max_num_seqs": 1}
    options["snapshot_interval"] = BETWEEN_SNAPSHOTS
    if args.max_model_len is not None:
        options["max_model_len"] = args.max_model_len
    return LLM(args.model, args.tokenizer, device=args.device, dtype=args.dtype, verbose=False, **options)


# -- save -------------------------------------------------------------------------------------------------------------

SAVE = """\
Read documents with a model, and keep what was read in a folder. A document that is there already costs nothing.

examples:
  oncelm cache save runs/book/model book.txt
  oncelm cache save runs/book/model chapters/*.txt
      each under its file's name
  cat notes.txt | oncelm cache save runs/book/model - --name notes
"""


def add_save_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="save")
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face or official YOCO folder, or hub id")
    parser.add_argument("files", nargs="+", metavar="FILE", help="documents, UTF-8 text; - for standard input")
    parser.add_argument("--name", metavar="NAME", help="of the document, if it is one (the file's name)")
    add_shared(parser, of_model=True)


def run_save(args: argparse.Namespace) -> int:
    from oncelm.data.encoding import encode_prompt
    from oncelm.engine.prefix import documents
    from oncelm.utils.units import size

    if args.name is not None and len(args.files) > 1:
        raise ValueError(f"--name is for one document; {len(args.files)} were given.")
    if "-" in args.files and args.name is None:
        raise ValueError("what comes from standard input needs a --name.")
    names = [documents.check_name(args.name or Path(file).name) for file in args.files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two of the files are called {twice}; save them one by one, each with a --name.")
    folder = folder_of(args)
    check_place(folder, "--cache-dir")
    texts = [read_text(file) for file in args.files]
    for file, text in zip(args.files, texts, strict=True):
        if not text:
            raise ValueError(f"{file} is empty.")
    with open_engine(args, folder) as llm:
        for name, file, text in zip(names, args.files, texts, strict=True):
            ids = encode_prompt(llm.tokenizer, text)
            seconds = read(llm, ids, name)
            document = named(llm, ids, name, args.model, file)
            documents.write(folder, document)
            (kept,) = documents.look(folder, [document])
            print(f"{name}: {len(ids):,} tokens in {seconds:.2f} s, {size(kept.num_bytes)} in {folder}")
    return 0


def read(llm: LLM, ids: list[int], name: str) -> float:
    """Read a document; the seconds that took, until it is on disk. A long read shows its progress."""
    from tqdm import tqdm

    start = time.perf_counter()
    with tqdm(total=len(ids), desc=name, unit=" tokens", unit_scale=True, delay=1, disable=None) as bar:
        llm.read({"prompt_token_ids": ids}, lambda done: bar.update(done - bar.n))
    cache_of(llm).flush()
    return time.perf_counter() - start


def named(llm: LLM, ids: list[int], name: str, model: str, file: str) -> Any:
    """A name for a document that was just read; OSError where it did not get to the disk."""
    from oncelm.engine.prefix.documents import Document

    cache = cache_of(llm)
    snapshot = cache.match([*ids, 0]).snapshot
    if snapshot is None or snapshot.n < len(ids) or not snapshot.file:
        raise OSError(f"{name} could not be written; the warning before says why.")
    source = "standard input" if file == "-" else str(Path(file).absolute())
    return Document(name, model, cache.fingerprint, snapshot.key.hex(), len(ids), source)


def cache_of(llm: LLM) -> Any:
    cache = llm.engine.cache
    assert cache is not None  # the option is on unless it is switched off
    return cache


# -- list -------------------------------------------------------------------------------------------------------------

LIST = """\
The documents in a folder: tokens, bytes, of which model, and when they were used last. A document whose files had to
make room for others, or were deleted, is shown as gone.

examples:
  oncelm cache list
  oncelm cache list --cache-dir /data/documents --json
"""


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="list")
    parser.add_argument("--json", action="store_true", help="a JSON list, for other programs")
    add_shared(parser)


def run_list(args: argparse.Namespace) -> int:
    from oncelm.engine.prefix import documents
    from oncelm.utils.units import size

    folder = folder_of(args)
    found = documents.look(folder, documents.read_all(folder))
    if args.json:
        print(json.dumps([as_json(kept) for kept in found], indent=1))
        return 0
    if not found:
        print(f"No documents in {folder}. Next: oncelm cache save MODEL FILE")
        return 0
    table = new_table(str(folder), "name", "|tokens", "|size", "model", "last used")
    for kept in found:
        what = kept.document
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.last_used)) if kept.line else "gone"
        table.add_row(what.name, f"{what.num_tokens:,}", size(kept.num_bytes) if kept.line else "", what.model, used)
    print_tables(table)
    return 0


def as_json(kept: Kept) -> dict[str, Any]:
    what = kept.document
    return {
        "name": what.name,
        "tokens": what.num_tokens,
        "bytes": kept.num_bytes,
        "model": what.model,
        "source": what.source,
        "last_used": kept.last_used if kept.line else None,
        "is_whole": kept.line is not None,
    }


# -- load -------------------------------------------------------------------------------------------------------------

LOAD = """\
Bring a document into memory, comparing every byte with its checksum, and say how long that took. With --ask, write what
follows the document and the question.

examples:
  oncelm cache load runs/book/model book.txt
  oncelm cache load runs/book/model book.txt --ask "Who killed the whale?" --max-new-tokens 50
"""


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="load")
    parser.add_argument("model", metavar="MODEL", help="the model that it was saved with")
    parser.add_argument("name", metavar="NAME", help="of the document")
    parser.add_argument("--ask", metavar="TEXT", help="a question, which stands behind the document")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of the answer (128)")
    add_shared(parser, of_model=True)


def run_load(args: argparse.Namespace) -> int:
    from oncelm.engine.prefix import documents
    from oncelm.utils import constraints as allowed
    from oncelm.utils.units import size

    allowed.check_options(args, {"max_new_tokens": allowed.Whole(1)})
    folder = folder_of(args)
    document = documents.find(folder, args.name)
    ids = documents.tokens(folder, document)
    with open_engine(args, folder) as llm:
        cache = cache_of(llm)
        if cache.fingerprint != document.fingerprint:
            raise ValueError(
                f"{args.name} was saved with {document.model}: that is another model than {args.model}, or --dtype or "
                "--kv-dtype are others."
            )
        start = time.perf_counter()
        llm.read({"prompt_token_ids": ids})
        synchronize(llm)
        seconds = time.perf_counter() - start
        (kept,) = documents.look(folder, [document])
        said = f"{args.name}: {len(ids):,} tokens, {size(kept.num_bytes)}"
        if cache.counts.tokens_hit == len(ids):
            print(f"{said}, checked and back in {seconds * 1e3:,.0f} ms", file=sys.stderr)
        else:
            print(f"{said}, damaged, and read again in {seconds:.2f} s", file=sys.stderr)
        if args.ask is not None:
            ask(llm, ids, typed_text(args.ask, "--ask"), args.max_new_tokens)
    return 0


def synchronize(llm: LLM) -> None:
    import torch

    if llm.model.device.type == "cuda":
        torch.cuda.synchronize(llm.model.device)


def ask(llm: LLM, ids: list[int], question: str, max_tokens: int) -> None:
    """Print what follows the document and the question, as it comes."""
    from oncelm.data.encoding import encode_prompt
    from oncelm.engine.params import SamplingParams

    start, first, printed = time.perf_counter(), None, 0
    prompt = {"prompt_token_ids": [*ids, *encode_prompt(llm.tokenizer, question, is_start=False)]}
    for output in llm.stream(prompt, SamplingParams(max_tokens=max_tokens, temperature=0)):
        answer = output.outputs[0]
        if first is None and answer.token_ids:
            first = time.perf_counter() - start
        sys.stdout.write(answer.text[printed:])
        sys.stdout.flush()
        printed = len(answer.text)
        if answer.error is not None:
            raise ValueError(answer.error)
    sys.stdout.write("\n")
    print(f"first token  after {(first or 0.0) * 1e3:,.0f} ms", file=sys.stderr)


# -- rm ---------------------------------------------------------------------------------------------------------------

REMOVE = """\
Delete documents, with what was kept of texts that go on behind them, and say what that frees. What other documents
begin with stays.

examples:
  oncelm cache rm book.txt
  oncelm cache rm --all
"""


def add_remove_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="rm")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of documents")
    parser.add_argument(
        "--all", action="store_true", help="of all models, and all else that engines keep in the folder"
    )
    add_shared(parser)


def run_remove(args: argparse.Namespace) -> int:
    from oncelm.engine.prefix import documents
    from oncelm.utils.units import size

    if bool(args.names) == args.all:
        raise ValueError("name the documents to delete, or give --all instead.")
    folder = folder_of(args)
    names = [document.name for document in documents.read_all(folder)] if args.all else list(dict.fromkeys(args.names))
    freed = documents.clear(folder) if args.all else documents.remove(folder, names)
    print(f"{len(names):,} document{'' if len(names) == 1 else 's'} deleted, {size(freed)} freed")
    return 0
