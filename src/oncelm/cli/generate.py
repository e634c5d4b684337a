"""`oncelm generate`: read a prompt of any length, then write what follows it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oncelm.cli.inputs import read_text, typed_text
from oncelm.cli.options import add_options, find_tokenizer, kv_dtype, model_keys, session_options
from oncelm.utils.files import check_place

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

    from oncelm.cache import Snapshot
    from oncelm.cli.printer import Printer
    from oncelm.models.session import Session

DESCRIPTION = """\
Read a prompt and write its continuation to standard output, token by token.

A prompt of any length is read in chunks: memory grows only with the one global cache, and half of the layers
run on the last token alone. A document that was read once can be kept in a file and asked about again and
again without reading it anew. Progress and measurements go to standard error.

Tokens are chosen as the options say. Of the model's generation_config.json counts where a text ends (special tokens,
stop strings) and what may come (penalties, suppressed tokens). A special token that the prompt spells, such as </s>,
is read as the tokenizer reads it: as that token with most models' own tokenizers, as text with OnceLM's.

examples:
  oncelm generate --model runs/book/model --prompt "It was a dark and stormy night"
      the most likely continuation
  oncelm generate --model runs/book/model --prompt-file book.txt --max-new-tokens 500 --temperature 0.8 --top-p 0.95
      read a book and go on with it, drawing each token at random
  cat notes.txt | oncelm generate --model runs/book/model --prompt-file - > continuation.txt
      in a pipe
  oncelm generate --model runs/book/model --prompt-file book.txt --max-new-tokens 0 --save-cache book.cache
      read a book, once
  oncelm generate --model runs/book/model --prompt-file page.html --no-special-tokens
      a document is data: what spells a special token in it stays text
  oncelm generate --model runs/book/model --load-cache book.cache --prompt "And so it ended that"
      continue after the book and this prompt; the book is not read again
  oncelm generate --model yoco-3b-official/ --dtype bfloat16 --prompt-file book.txt
      a folder of the official YOCO code, with its tokenizer
  oncelm generate --model long_llama_3b/ --prompt-file book.txt --memory cpu
      LongLLaMA: the book's keys and values in CPU memory, streamed to the GPU
  oncelm generate --model smollm2/ --mem-layers 8,16,24 --prompt-file book.txt --last-context-length 512
      any LLaMA-family model as a LongLLaMA (it answers well once it is trained for that: docs/longllama.md)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a Hugging Face or official YOCO folder, or hub id"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue; - for standard input")
    add_options(parser, "tokenizer")
    parser.add_argument(
        "--special-tokens",
        action=argparse.BooleanOptionalAction,
        help="what spells a special token in the prompt becomes that token, or stays text (as the tokenizer does it)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to write at most (128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token (0)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest tokens of probability P in all"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--seed", type=int, help="repeat the same random draws")
    parser.add_argument(
        "--prefill-chunk-size",
        type=int,
        metavar="N",
        help="tokens of the prompt read at a time (2048 on a CPU; on a GPU what its free memory allows, up to 32768)",
    )
    add_options(parser, "mem_layers", "last_context_length", "memory", "device", "dtype")
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        metavar="DTYPE",
        help="what the global cache or a LongLLaMA's memory stores: auto (that of --load-cache, or the model's), "
        "bfloat16, int8 (half of its bytes) or, YOCO alone, float8",
    )
    parser.add_argument("--save-cache", metavar="FILE", help="keep what was read in this file")
    parser.add_argument("--load-cache", metavar="FILE", help="go on from what was kept in this file")


def run(args: argparse.Namespace) -> int:
    check_options(args)
    text = typed_text(args.prompt, "--prompt") if args.prompt is not None else read_text(args.prompt_file)

    from oncelm.cli.sampling import keep_what_fits
    from oncelm.models.load import load, quiet_transformers, read_config
    from oncelm.models.registry import family, titles

    config = read_config(args.model, **model_keys(args))  # what is wrong with it shows before anything large is read
    options, able = session_options(config, args), family(config)
    if able.reads_by_windows and args.prefill_chunk_size is not None:
        raise ValueError(f"--prefill-chunk-size is not for {able.title} models: they read window by window.")
    if (dtype := kv_dtype(config, args)) is not None:
        options["cache_options"]["dtype"] = dtype
    if not able.has_own_cache and (args.save_cache or args.load_cache):
        raise ValueError(
            f"--save-cache and --load-cache are for {titles(lambda one: one.has_own_cache)} models; {args.model} is a "
            f"model of type {config.model_type}."
        )
    tokenizer = find_tokenizer(args.model, args.tokenizer)
    model = load(args.model, args.device, args.dtype, config=config)
    ids = encode(text, tokenizer, model, args.special_tokens, is_start=args.load_cache is None)
    stops = keep_what_fits(model, tokenizer)
    with quiet_transformers():
        read_and_write(model, tokenizer, ids, args, options, stops)
    return 0


# -- input ------------------------------------------------------------------------------------------------------------


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that make no sense, before a model is loaded."""
    from oncelm.utils import constraints as allowed

    allowed.check_options(
        args,
        {
            "max_new_tokens": allowed.Whole(0, 2**40),
            "temperature": allowed.Number(0),
            "top_p": allowed.Number(0, 1, open_low=True),
            **dict.fromkeys(("top_k", "prefill_chunk_size"), allowed.Whole(1)),
            "seed": allowed.Whole(0),
        },
    )
    if args.temperature == 0 and (args.top_p is not None or args.top_k is not None):
        raise ValueError("--top-p and --top-k choose what to draw from; give a --temperature above 0 with them.")
    if args.save_cache and Path(args.save_cache).is_dir():
        raise ValueError(f"--save-cache {args.save_cache} is a folder; name a file.")
    if args.save_cache:
        check_place(args.save_cache, "--save-cache")


def encode(
    text: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, special_tokens: bool | None, is_start: bool
) -> torch.Tensor:
    """The prompt's ids [1, T] on the model's device; the rest as in `encode_prompt`."""
    import torch

    from oncelm.data.encoding import encode_prompt

    ids = encode_prompt(tokenizer, text, special_tokens, is_start)
    if not text or not ids:
        raise ValueError("the prompt is empty; give at least one character.")
    vocab_size = model.config.get_text_config().vocab_size
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {max(ids)}, but the model knows {vocab_size} tokens only; "
            "name the tokenizer it was trained with: --tokenizer."
        )
    return torch.tensor([ids], device=model.device)


def warn_if_long(model: PreTrainedModel, tokens: int) -> None:
    """A longer prompt than the model was trained on works, but not always well; memory layers have no such limit."""
    from oncelm.models.registry import family

    if family(model.config).reads_by_windows:
        return
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        print(
            f"oncelm: warning: {tokens:,} tokens to read, but the model was trained on {limit:,} "
            "(max_position_embeddings); quality may suffer.",
            file=sys.stderr,
        )


# -- reading and writing ----------------------------------------------------------------------------------------------


def read_and_write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    args: argparse.Namespace,
    options: dict[str, dict[str, Any]],
    stops: StoppingCriteriaList,
) -> None:
    """Read all but the prompt's last token into a cache, then write on from there.

    A model of transformers reads its prompt as it writes: not every cache of theirs can be gone on with.
    """
    from oncelm.cache import load_snapshot
    from oncelm.cli.printer import Printer
    from oncelm.cli.sampling import sampling
    from oncelm.models.registry import family
    from oncelm.models.session import open_session

    has_own_cache = family(model.config).has_own_cache
    kept = load_snapshot(args.load_cache, model.fingerprint(), model.device) if args.load_cache else None
    earlier = kept.columns if kept is not None else 0
    total = earlier + ids.shape[1]
    warn_if_long(model, total)
    if kept is not None:
        options["cache_options"]["dtype"] = dtype_of(kept, options["cache_options"].get("dtype"), args)
    session = open_session(model, 1, total + args.max_new_tokens, args.prefill_chunk_size, **options)
    if kept is not None:
        session.open().restore(kept)
        del kept
    seconds = read(session, ids[:, :-1]) if has_own_cache else 0.0
    if args.save_cache:
        save_document(session, ids[:, -1:], args.save_cache)
    printer = Printer(tokenizer, ids[0].tolist())
    if args.max_new_tokens:
        chunks = {} if has_own_cache else {"prefill_chunk_size": args.prefill_chunk_size}
        session.generate(
            ids[:, -1:] if earlier else ids,
            generation_config=sampling(args, return_dict_in_generate=True, **chunks),
            stopping_criteria=stops,
            streamer=printer,
        )
    summarize(ids.shape[1], earlier, seconds, printer, session.nbytes())


def dtype_of(kept: Snapshot, asked: torch.dtype | None, args: argparse.Namespace) -> torch.dtype | None:
    """What a cache that goes on from `kept` stores: the same, unless --kv-dtype names another kind of float."""
    from oncelm.ops.quantize import LARGEST

    there = kept.kv_dtype
    if asked is not None and there is not None and asked != there and {asked, there} & {*LARGEST}:
        name = str(there).removeprefix("torch.")
        raise ValueError(
            f"--kv-dtype {args.kv_dtype} does not fit {args.load_cache}, whose keys and values are {name}; "
            "leave it out."
        )
    return asked or there


def read(session: Session, ids: torch.Tensor) -> float:
    """Read ids [1, T] (T may be 0); returns the seconds it took. A long read shows its progress."""
    from tqdm import tqdm

    if not ids.shape[1]:
        return 0.0
    start, first = time.perf_counter(), session.num_tokens
    with tqdm(total=ids.shape[1], desc="reading", unit=" tokens", unit_scale=True, delay=1, disable=None) as bar:
        session.read(ids, lambda done: bar.update(done - first - bar.n))
    return time.perf_counter() - start


def save_document(session: Session, last: torch.Tensor, file: str) -> None:
    """Write what was read, with the prompt's last token [1, 1], to `file`; the session stays without that token."""
    from oncelm.cache import save_snapshot
    from oncelm.utils.units import size

    cache = session.open()
    cache.record()
    session.read(last)
    save_snapshot(cache.snapshot(), file, session.model.fingerprint())
    print(f"saved        {cache.num_tokens:,} tokens in {file}, {size(Path(file).stat().st_size)}", file=sys.stderr)
    cache.crop(1)
    cache.record(False)


# -- output -----------------------------------------------------------------------------------------------------------


def summarize(tokens: int, earlier: int, prefill_seconds: float, printer: Printer, cache_bytes: int) -> None:
    """Print what was measured."""
    from oncelm.utils.units import size

    rows = {"prompt": f"{tokens:,} tokens"}
    if earlier:
        rows["prompt"] += f", after {earlier:,} from the cache file"
    if prefill_seconds:
        rows["prefill"] = f"{prefill_seconds:.2f} s, {(tokens - 1) / prefill_seconds:,.0f} tokens/s"
    start, *times = printer.times or [0.0]
    if times:
        rows["first token"] = f"after {prefill_seconds + times[0] - start:.2f} s"
        rows["decode"] = f"{len(times):,} tokens"
    if len(times) > 1:
        rows["decode"] += f", {(len(times) - 1) / (times[-1] - times[0]):,.1f} tokens/s"
    if cache_bytes:
        rows["cache"] = size(cache_bytes)
    for name, value in rows.items():
        print(f"{name:<12} {value}", file=sys.stderr)
