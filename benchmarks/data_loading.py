"""Preparing text beside the tokenizer library alone, and loading batches, on this machine.

    python benchmarks/data_loading.py --out benchmarks/results/cpu-data.jsonl

Each round measures, one after the other, so that a busy machine is busy for all of them alike:

    library   the tokenizer library's own encode_batch_fast, in its threads, over texts in memory; ids dropped
    threads   the same function, called by one thread a core, over the same texts; ids dropped
    prepare   `oncelm.data.prepare.prepare`: two JSONL files to shards on disk, with checksums and fsync
    one file  the same texts in one .jsonl.zst, which only one thread can read

Then the time to load a batch of random blocks, and how long a training step waits for one that is read ahead.
A line of the result has tokens per second, CPU seconds of all threads per million tokens (which a busy machine
disturbs less), peak memory above that before, and the load average before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from oncelm.bench.measure import PeakMemory
from oncelm.data.corpora import load_corpus
from oncelm.data.dataset import TokenDataset
from oncelm.data.encoding import Encoder
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import prepare
from oncelm.data.read_ahead import ReadAhead
from oncelm.data.reading import zstd_module
from oncelm.data.tokenizers import load_tokenizer
from oncelm.data.tokens import open_tokens
from oncelm.utils.environment import environment_report, usable_cores

SEQ_LEN, BATCH_SIZE = 2048, 16
STEP_SECONDS = 0.1  # of a training step that leaves the CPU alone, as one on a GPU does


def library(encoder: Encoder, texts: Sequence[str]) -> int:
    return sum(map(len, encoder._backend.encode_batch_fast(texts, add_special_tokens=False)))


def threads(encoder: Encoder, texts: Sequence[str]) -> int:
    groups = [texts[i : i + 8] for i in range(0, len(texts), 8)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ThreadPoolExecutor(usable_cores()) as pool:
        count = sum(pool.map(lambda group: library(encoder, group), groups))
    del os.environ["TOKENIZERS_PARALLELISM"]
    return count


def prepared(text: Path, tokenizer, folder: Path) -> int:
    tokens = open_tokens(prepare(find_corpus(text), tokenizer, folder))
    return tokens.train[0].stream.num_tokens


def measured(work: Callable[[], int]) -> dict[str, float]:
    load = os.getloadavg()[0]
    cpu, start = time.process_time(), time.perf_counter()
    with PeakMemory(torch.device("cpu")) as peak:
        tokens = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "cpu_seconds_per_million_tokens": cpu / tokens * 1e6,
        "peak_bytes": peak.bytes,
        "load_average": [load, os.getloadavg()[0]],
    }


def loading(dataset: TokenDataset, steps: int = 40) -> dict[str, float]:
    """Seconds to load a batch, and seconds that a step waits for one that is read ahead."""
    alone = []
    for step in range(steps):
        start = time.perf_counter()
        dataset.batch(step, BATCH_SIZE)
        alone.append(time.perf_counter() - start)
    waits = []
    with ReadAhead(dataset) as ahead:
        ahead.batch(0, BATCH_SIZE)
        for step in range(1, steps):
            time.sleep(STEP_SECONDS)
            start = time.perf_counter()
            ahead.batch(step, BATCH_SIZE)
            waits.append(time.perf_counter() - start)
    return {
        "load_seconds": statistics.median(alone),
        "wait_seconds": statistics.mean(waits),
        "step_seconds": STEP_SECONDS,
        "wait_share": statistics.mean(waits) / (STEP_SECONDS + statistics.mean(waits)),
        "sequence_length": SEQ_LEN,
        "batch_size": BATCH_SIZE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--tokenizer", default="cl100k_base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=2, help="of 12 MB of addresses and a novel")
    args = parser.parse_args()
    lines = [{"part": "environment", **environment_report()}]
    tokenizer = load_tokenizer(args.tokenizer)
    encoder = Encoder(tokenizer)
    texts = [document.text for name in ("sotu", "moby_dick") for document in load_corpus(name)] * args.copies
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.mkdir()
        for number, shard in enumerate((texts[0::2], texts[1::2])):
            lines_of = "".join(json.dumps({"text": one}) + "\n" for one in shard)
            (text / f"{number}.jsonl").write_text(lines_of, encoding="utf-8")
        compressed = Path(folder) / "compressed" / "all.jsonl.zst"
        compressed.parent.mkdir()
        with zstd_module().open(compressed, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": one}) + "\n" for one in texts)
        threads(encoder, texts)  # warm: the library remembers words that it has seen
        for number in range(args.rounds):
            out = Path(folder) / f"tokens-{number}"
            for name, work in (
                ("library", lambda: library(encoder, texts)),
                ("threads", lambda: threads(encoder, texts)),
                ("prepare", lambda out=out: prepared(text, tokenizer, out)),
                ("one file", lambda out=out: prepared(compressed.parent, tokenizer, out.with_name(f"{out.name}-one"))),
            ):
                line = {"part": name, "round": number, "tokenizer": args.tokenizer, **measured(work)}
                print(name, f"{line['tokens_per_second']:,.0f} tokens/s, load {line['load_average']}", flush=True)
                lines.append(line)
        tokens = open_tokens(out)
        dataset = TokenDataset(tokens.train, SEQ_LEN)
        lines.append({"part": "loading", **loading(dataset), "load_average": os.getloadavg()[0]})
        print(lines[-1])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
