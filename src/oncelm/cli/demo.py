"""`oncelm demo`: what OnceLM is for, on this machine, in about five minutes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oncelm.cli.options import token_counts
from oncelm.cli.output import print_tables
from oncelm.utils.files import check_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from oncelm.bench.targets import Target
    from oncelm.models import YocoForCausalLM

DESCRIPTION = """\
Train a small YOCO and a Llama of the same size on 210 years of State of the Union addresses, half of
--train-seconds each; read a whole novel with the YOCO, in chunks with early exit, and continue it; then measure both
models at several lengths. Everything ships with the package: no GPU, no network, no account.

The models see about a minute of text: expect the tone of an address, not sense. What the demo shows
is the machinery, and what each model costs as the context grows.

OUT receives the models (OUT/yoco/model works with `oncelm generate`), the figures (comparison.json) and a plot.

examples:
  oncelm demo
  oncelm demo --train-seconds 600 --document my_book.txt
  oncelm demo --lengths 1024,4096,16384 --out runs/quick
"""

PRESET = "yoco-tiny"  # learns more in a minute of two cores than a larger one: it takes more steps
VOCAB_SIZE = 4096
DECODED_TOKENS = 32  # in a measurement of decoding
LAST_TRAINING_YEAR = 1999  # later addresses are held out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder for everything written (runs/demo)")
    parser.add_argument("--train-seconds", type=float, default=120, help="training time of both models together (120)")
    parser.add_argument("--document", metavar="FILE", help="text to read (the bundled Moby-Dick)")
    parser.add_argument("--max-document-tokens", type=int, metavar="N", help="read no more of it than this (all)")
    parser.add_argument("--lengths", default="4096,16384,65536", help="tokens to compare at (4096,16384,65536)")
    parser.add_argument("--new-tokens", type=int, default=80, help="length of the continuation (80)")


def run(args: argparse.Namespace) -> int:
    import torch

    from oncelm.bench.peer import PeerTarget
    from oncelm.bench.targets import OwnTarget
    from oncelm.utils.constraints import POSITIVE, Whole, check_options

    counts = {"max_document_tokens": Whole(2, 2**40), "new_tokens": Whole(1, 2**40)}
    check_options(args, {"train_seconds": POSITIVE, **counts})
    lengths = _lengths(args.lengths)
    check_place(args.out, "--out")
    out = Path(args.out)
    book = _read_document(args.document)
    started = time.perf_counter()
    torch.manual_seed(0)

    _heading("1. Training, on State of the Union addresses of 1790 to 1999")
    tokenizer, yoco, llama = _train_both(out, args.train_seconds)

    ids = tokenizer(book, return_tensors="pt", verbose=False).input_ids[:, : args.max_document_tokens]
    _heading(f"2. Reading {args.document or 'Moby-Dick'}: {ids.shape[1]:,} tokens")
    _read_and_continue(yoco, tokenizer, ids, args.new_tokens)

    _heading("3. The two models side by side")
    targets: list[Target] = [OwnTarget(yoco), PeerTarget(llama)]
    rows = _compare(targets, tokenizer, book, [length for length in lengths if length <= ids.shape[1]])
    _report(rows, out)
    print(
        f"\nThe demo took {time.perf_counter() - started:.0f} s. Next: oncelm generate --model {out / 'yoco' / 'model'}"
    )
    print('      --prompt "My fellow citizens" --temperature 0.8')
    return 0


def _lengths(text: str) -> list[int]:
    lengths = sorted(set(token_counts(text)))
    if lengths[0] < 2:
        raise ValueError(f"--lengths must be at least 2 tokens, got {lengths[0]}.")
    return lengths


def _read_document(path: str | None) -> str:
    from oncelm.data.corpora import load_corpus
    from oncelm.data.reading import read_text

    if path is not None:
        return read_text(Path(path))
    return "\n\n".join(document.text for document in load_corpus("moby_dick"))


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _train_both(out: Path, seconds: float) -> tuple[PreTrainedTokenizerBase, YocoForCausalLM, PreTrainedModel]:
    """The same data, steps as the time allows, schedule and seed for both; half the time each."""
    import shutil

    import torch
    from transformers import LlamaForCausalLM

    from oncelm.bench.peer import llama_config
    from oncelm.data.corpora import load_corpus
    from oncelm.data.dataset import TokenDataset
    from oncelm.data.layout import find_corpus
    from oncelm.data.prepare import prepare
    from oncelm.data.tokenizers import train_bpe
    from oncelm.data.tokens import open_tokens
    from oncelm.models import build_model
    from oncelm.train.config import TrainConfig
    from oncelm.train.trainer import Trainer

    corpus = out / "state_of_the_union"
    corpus.mkdir(parents=True, exist_ok=True)
    documents = load_corpus("sotu", last_year=LAST_TRAINING_YEAR)
    for number, document in enumerate(documents):
        (corpus / f"{number:03d}-{document.year}.txt").write_text(document.text, encoding="utf-8")
    tokenizer = train_bpe((document.text for document in documents), VOCAB_SIZE)
    tokens = open_tokens(prepare(find_corpus(corpus), tokenizer))
    count = sum(source.stream.num_tokens for source in tokens.train)
    print(f"{len(documents)} addresses, {count:,} tokens of a byte-pair encoding with {VOCAB_SIZE} entries")

    yoco = build_model(PRESET, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    models: dict[str, Any] = {"yoco": yoco, "llama": LlamaForCausalLM(llama_config(yoco.config))}
    for name, model in models.items():
        shutil.rmtree(out / name, ignore_errors=True)  # a demo starts over
        config = TrainConfig(
            data=str(corpus),
            out=str(out / name),
            steps=None,
            max_seconds=seconds / len(models),
            seq_len=512,
            batch_size=4,
            lr=3e-3,
            warmup_steps=20,
            eval_every=None,
            eval_batches=8,
            save_every=None,
            device="cpu",
        )
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"\n{type(model).__name__}, {count / 1e6:.1f}M parameters, {seconds / len(models):.0f} s", flush=True)
        dataset = TokenDataset(tokens.train, config.seq_len, seed=config.seed, validation_fraction=0.02)
        result = Trainer(model, dataset, config, tokenizer).train()
        if result.interrupted:
            raise KeyboardInterrupt
        print(f"{result.tokens:,} tokens in {result.seconds:.0f} s; loss on held-out text {result.validation_loss:.3f}")
        model.eval()
    return tokenizer, yoco, models["llama"]


def _read_and_continue(model: YocoForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: Any, new_tokens: int) -> None:
    from tqdm import tqdm

    from oncelm.cli.printer import Printer
    from oncelm.models.load import quiet_transformers
    from oncelm.models.session import open_session

    T = ids.shape[1]
    session = open_session(model, 1, T + new_tokens)
    start = time.perf_counter()
    with tqdm(total=T - 1, desc="read", unit="tok", unit_scale=True, file=sys.stderr) as bar:
        session.read(ids[:, :-1], lambda done: bar.update(done - bar.n))  # generate takes the last one
    seconds = time.perf_counter() - start
    print(
        f"{T:,} tokens in {seconds:.1f} s ({T / seconds:,.0f} tokens/s); the cross-decoder ran on one of them. "
        f"Cache: {session.nbytes() / 2**20:.1f} MiB.\n"
    )
    print(f"... {tokenizer.decode(ids[0, -40:]).strip()}  ==>  ", end="", flush=True)
    with quiet_transformers():  # it warns that the text is longer than those of the training
        session.generate(
            ids,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            streamer=Printer(tokenizer, ids[0].tolist()),
        )


def _compare(
    targets: Sequence[Target], tokenizer: PreTrainedTokenizerBase, text: str, lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """Every model at every length, once each: a row of figures. The text is cut to give `length` tokens."""
    import torch
    from tqdm import tqdm

    from oncelm.bench.measure import PeakMemory

    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    rows = []
    jobs = [(length, target) for length in lengths for target in targets]
    with torch.no_grad(), tqdm(jobs, desc="measure", file=sys.stderr) as bar:
        for length, target in bar:
            bar.set_postfix_str(f"{target.name}, {length:,} tokens")
            prompt = text[: encoded["offset_mapping"][length - 1][1]]
            target.prefill(torch.tensor([encoded["input_ids"][:256]]))  # warm up
            start = time.perf_counter()
            ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
            encoding_seconds = time.perf_counter() - start
            with PeakMemory(target.model.device) as peak:
                start = time.perf_counter()
                logits, session = target.prefill(ids)
                prefill_seconds = time.perf_counter() - start
                cache_bytes = session.nbytes()
            tokenizer.decode(logits.argmax(-1))
            first_token_seconds = encoding_seconds + time.perf_counter() - start
            del session
            session = target.context(1, length, DECODED_TOKENS + 1)
            token = logits.argmax(-1, keepdim=True)
            session.step(token)
            start = time.perf_counter()
            for _ in range(DECODED_TOKENS):
                token = session.step(token).argmax(-1, keepdim=True)
            decode_seconds = time.perf_counter() - start
            rows.append(
                {
                    "model": target.name,
                    "length": length,
                    "prefill_seconds": prefill_seconds,
                    "first_token_seconds": first_token_seconds,
                    "decode_tokens_per_second": DECODED_TOKENS / decode_seconds,
                    "cache_bytes": cache_bytes,
                    "peak_bytes": peak.bytes,
                }
            )
    return rows


def _report(rows: Sequence[dict[str, Any]], out: Path) -> None:
    from rich.table import Table

    from oncelm.bench.plot import plot_by_length
    from oncelm.utils.environment import environment_report
    from oncelm.utils.files import atomic_file

    table = Table(title="one measurement each; memory above the weights")
    for name in ("context", "model", "prefill", "first token", "decode", "cache", "peak memory"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        if row["model"] == rows[0]["model"]:
            table.add_section()
        table.add_row(
            f"{row['length']:,}",
            row["model"],
            f"{row['prefill_seconds']:.2f} s",
            f"{row['first_token_seconds']:.2f} s",
            f"{row['decode_tokens_per_second']:.0f} tok/s",
            f"{row['cache_bytes'] / 2**20:.1f} MiB",
            f"{row['peak_bytes'] / 2**20:.1f} MiB",
        )
    print_tables(table)
    with atomic_file(out / "comparison.json") as temporary:
        temporary.write_text(json.dumps({"environment": environment_report(), "rows": rows}, indent=2) + "\n")
    try:
        plot_by_length(rows, out / "comparison.png", "YOCO and Llama of the same size, trained in this demo")
    except ImportError as error:
        print(f"no plot: {error}")
    else:
        print(f"Plot: {out / 'comparison.png'}")
