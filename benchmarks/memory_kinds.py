"""A token behind a long memory of each kind: seconds, distance from exact attention, what a search finds.

    python benchmarks/memory_kinds.py MODEL TEXT --tokens 32K --out results.jsonl

MODEL is a LongLLaMA's folder, TEXT a .txt or .jsonl file (its first document) or moby_dick. The text is read once; what
is remembered then goes into a cache of each kind, and the text's next tokens follow, one by one. One line a kind:
seconds to take the memory in (for a search: to build its indexes), the median second of a token, the cache's bytes, the
divergence of the tokens' distributions from the exact ones' (nats, mean), and the recall of each memory layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import oncelm
from oncelm.cache import Snapshot
from oncelm.eval.documents import read_documents
from oncelm.eval.task import parse_tokens
from oncelm.models import LongLlamaForCausalLM
from oncelm.utils.environment import environment_report

KINDS: tuple[dict[str, Any], ...] = (
    {"memory": "exact"},
    {"memory": "cpu"},
    {"memory": "cpu", "mem_dtype": "int8"},
    {"memory": "disk"},
    *({"memory": "knn", "index": index, "top_k": 128} for index in ("flat", "ivf", "hnsw")),
)


class Clock:
    """Seconds since it was asked last."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, 0.0

    def seconds(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        last, self.last = self.last, time.perf_counter()
        return self.last - last


def write_tokens(
    model: LongLlamaForCausalLM, snapshot: Snapshot, kind: dict[str, Any], following: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor]:
    """What was measured with a memory of this kind, and log-probabilities [n, V] behind each of following [1, n]."""
    options = dict(kind)
    model.config.mem_dtype = options.pop("mem_dtype", None)
    clock = Clock(model.device)
    clock.seconds()
    cache = model.new_cache(1, **options)
    cache.restore(snapshot)
    restored, times, rows = clock.seconds(), [], []
    for token in following.split(1, dim=1):
        clock.seconds()
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        times.append(clock.seconds())
        rows.append(logits.float().log_softmax(-1))
    line = {"restore_seconds": restored, "token_seconds": statistics.median(times), "bytes": cache.nbytes()}
    return line | {"recall": cache.recall()}, torch.stack(rows)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--tokens", type=parse_tokens, default="32K", help="in memory (%(default)s)")
    parser.add_argument("--following", type=int, default=16, help="tokens that follow (%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="lines are added to it")
    args = parser.parse_args(arguments)
    model = oncelm.load(args.model, args.device, args.dtype)
    tokenizer, document = oncelm.load_tokenizer(args.model), next(iter(read_documents(args.text)))
    ids = tokenizer(document.text, return_tensors="pt").input_ids[:, : args.tokens + args.following].to(model.device)
    if ids.shape[1] < args.tokens + args.following:
        parser.error(f"{args.text} has {ids.shape[1]:,} tokens, fewer than --tokens and --following.")
    prompt, following = ids.split([args.tokens, args.following], dim=1)
    model.config.mem_dtype = None
    cache = model.new_cache(1, args.tokens)
    with tqdm(desc="read", total=args.tokens, unit=" tokens", unit_scale=True) as bar:
        model.prefill(prompt, cache, progress=lambda tokens: bar.update(tokens - bar.n))
    snapshot = cache.snapshot()
    del cache
    exact = None
    for kind in KINDS:
        line, rows = write_tokens(model, snapshot, kind, following)
        if kind["memory"] == "knn":  # once more: looking for the true nearest keys takes time
            line["recall"] = write_tokens(model, snapshot, {**kind, "measure_recall": True}, following)[0]["recall"]
        exact = rows if exact is None else exact
        divergence = torch.nn.functional.kl_div(rows, exact, log_target=True, reduction="batchmean").item()
        line = {"benchmark": "memory_kinds", **kind, "tokens": args.tokens, "dtype": args.dtype, **line}
        line |= {"kl_to_exact": divergence, "document": document.name, "environment": environment_report()}
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({key: value for key, value in line.items() if key != "environment"}), flush=True)


if __name__ == "__main__":
    main()
