"""`oncelm generate`: read a prompt of any length, then write what follows it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from oncelm.cli.options import add_options, check_memory_options, find_tokenizer, model_keys
from oncelm.utils.place import check_place

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

    from oncelm.cache import YocoCache
    from oncelm.cache.base import Snapshot
    from oncelm.cache.longllama.cache import LongLlamaCache
    from oncelm.cli.printer import Printer

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
    text = typed_text(args.prompt) if args.prompt is not None else read_text(args.prompt_file)

    from oncelm.cli.sampling import keep_what_fits
    from oncelm.models.load import load, quiet_transformers, read_config
    from oncelm.models.registry import family
    from oncelm.utils.device import resolve_kv_dtype

    kv_dtype = resolve_kv_dtype(args.kv_dtype)
    config = read_config(args.model, **model_keys(args))  # what is wrong with it shows before anything large is read
    check_memory_options(config, args)
    if family(config).reads_by_windows and args.prefill_chunk_size is not None:
        raise ValueError("--prefill-chunk-size is not for LongLLaMA models: they read window by window.")
    if kv_dtype is not None and config.model_type == "longllama":  # its cache grows in memory, and nowhere else
        if args.kv_dtype == "float8":
            raise ValueError(
                "--kv-dtype float8 is for YOCO's global cache only; a LongLLaMA's memory takes auto, bfloat16 or int8."
            )
        config.mem_dtype, kv_dtype = str(kv_dtype).removeprefix("torch."), None
    tokenizer = find_tokenizer(args.model, args.tokenizer)
    model = load(args.model, args.device, args.dtype, config=config)
    ids = encode(text, tokenizer, model, args.special_tokens, is_start=args.load_cache is None)
    stops = keep_what_fits(model, tokenizer)
    with quiet_transformers():
        if hasattr(model, "prefill"):
            read_and_write(model, tokenizer, ids, args, kv_dtype, stops)
        elif args.save_cache or args.load_cache or kv_dtype is not None:
            kind = type(model).__name__
            raise ValueError(
                f"--save-cache, --load-cache and --kv-dtype need a YOCO or LongLLaMA model; {args.model} is a {kind}."
            )
        else:
            write_only(model, tokenizer, ids, args, stops)
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


def read_text(file: str) -> str:
    """The text of a file, or of standard input for "-", exactly as it is, but for a byte order mark."""
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    return utf8(content, "standard input" if file == "-" else file).removeprefix("\ufeff")


def typed_text(text: str) -> str:
    """The text of an argument, which Python hands over as single bytes where the locale says ASCII (LC_ALL=C)."""
    return utf8(text.encode("utf-8", "surrogateescape"), "--prompt")


def utf8(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error


def encode(
    text: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, special_tokens: bool | None, is_start: bool
) -> torch.Tensor:
    """The prompt's ids [1, T] on the model's device.

    Args:
        special_tokens: whether what spells a special token becomes one; None means as the tokenizer does it.
        is_start: whether the text begins here: some tokenizers put a mark before it.
    """
    import torch

    options = {} if special_tokens is None else {"split_special_tokens": not special_tokens}
    ids = tokenizer(text, add_special_tokens=is_start, verbose=False, **options).input_ids
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
    if getattr(model.config, "mem_layers", None):
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
    kv_dtype: torch.dtype | None,
    stops: StoppingCriteriaList,
) -> None:
    """Prefill a cache with all but the prompt's last token, then generate from there."""
    import torch

    from oncelm.cache import load_snapshot
    from oncelm.cli.printer import Printer
    from oncelm.cli.sampling import sampling

    kept = load_snapshot(args.load_cache, model.fingerprint(), model.device) if args.load_cache else None
    earlier = kept.columns if kept is not None else 0
    total = earlier + ids.shape[1]
    warn_if_long(model, total)
    own = {} if args.memory is None else {"memory": args.memory}
    if kept is not None:
        kv_dtype = dtype_of(kept, model, args)
    cache = model.new_cache(1, total + args.max_new_tokens, kv_dtype, **own)
    if kept is not None:
        cache.restore(kept)
        del kept

    seconds = prefill(model, ids[:, :-1], cache, args)
    if args.save_cache:
        save_document(model, ids[:, -1:], cache, args.save_cache)
    printer = Printer(tokenizer, ids[0].tolist())
    if args.max_new_tokens:
        # a mask longer than the ids tells generate that the cache holds what came before them
        mask = torch.ones(1, total, dtype=torch.long, device=ids.device)
        held = ids if not earlier else ids[:, -1:]
        model.generate(
            held,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=sampling(args),
            stopping_criteria=stops,
            streamer=printer,
        )
    summarize(ids.shape[1], earlier, seconds, printer, cache.nbytes())


def dtype_of(kept: Snapshot, model: PreTrainedModel, args: argparse.Namespace) -> torch.dtype | None:
    """What a cache that goes on from `kept` stores: the same, unless --kv-dtype names another kind of float.

    Of a LongLLaMA it is its memory's, which the configuration names; None then.
    """
    from oncelm.ops.quantize import LARGEST
    from oncelm.utils.device import resolve_kv_dtype

    asked, there = resolve_kv_dtype(args.kv_dtype), kept.kv_dtype
    if asked is not None and there is not None and asked != there and {asked, there} & {*LARGEST}:
        name = str(there).removeprefix("torch.")
        raise ValueError(
            f"--kv-dtype {args.kv_dtype} does not fit {args.load_cache}, whose keys and values are {name}; "
            "leave it out."
        )
    if model.config.model_type != "longllama":
        return asked or there
    if asked is None and there is not None:
        model.config.mem_dtype = str(there).removeprefix("torch.")
    return None


def prefill(
    model: PreTrainedModel, ids: torch.Tensor, cache: YocoCache | LongLlamaCache, args: argparse.Namespace
) -> float:
    """Read ids [1, T] (T may be 0) into the cache; returns the seconds it took. A long read shows its progress."""
    from tqdm import tqdm

    tokens = ids.shape[1]
    if tokens == 0:
        return 0.0
    option = "last_context_length" if model.config.model_type == "longllama" else "prefill_chunk_size"
    own = {option.removeprefix("prefill_"): getattr(args, option)}
    start = time.perf_counter()
    with tqdm(total=tokens, desc="reading", unit=" tokens", unit_scale=True, delay=1, disable=None) as bar:
        model.prefill(ids, cache, **own, progress=lambda done: bar.update(done - bar.n))
    return time.perf_counter() - start


def save_document(model: PreTrainedModel, last: torch.Tensor, cache: YocoCache | LongLlamaCache, file: str) -> None:
    """Write the cache with the prompt's last token [1, 1] in it to `file`, and leave `cache` without that token."""
    from oncelm.cache import YocoCache, save_snapshot
    from oncelm.utils.units import size

    before = cache.snapshot(shared=False) if isinstance(cache, YocoCache) else None
    model.prefill(last, cache)
    save_snapshot(cache.snapshot(), file, model.fingerprint())
    print(f"saved        {cache.num_tokens:,} tokens in {file}, {size(Path(file).stat().st_size)}", file=sys.stderr)
    if before is None:
        cache.crop(1)
    else:
        cache.restore(before)


def write_only(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    args: argparse.Namespace,
    stops: StoppingCriteriaList,
) -> None:
    """The same with a model that transformers prefills by itself."""
    from oncelm.cli.printer import Printer
    from oncelm.cli.sampling import sampling

    warn_if_long(model, ids.shape[1])
    printer = Printer(tokenizer, ids[0].tolist())
    cache_bytes = None
    if args.max_new_tokens:
        options = sampling(args, prefill_chunk_size=args.prefill_chunk_size, return_dict_in_generate=True)
        output = model.generate(ids, generation_config=options, stopping_criteria=stops, streamer=printer)
        layers = getattr(output.past_key_values, "layers", ())
        held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        cache_bytes = sum(tensor.nbytes for tensor in held if tensor is not None)
    summarize(ids.shape[1], 0, 0.0, printer, cache_bytes)


# -- output -----------------------------------------------------------------------------------------------------------


def summarize(tokens: int, earlier: int, prefill_seconds: float, printer: Printer, cache_bytes: int | None) -> None:
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
    if cache_bytes is not None:
        rows["cache"] = size(cache_bytes)
    for name, value in rows.items():
        print(f"{name:<12} {value}", file=sys.stderr)
