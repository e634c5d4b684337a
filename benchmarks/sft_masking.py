"""What masked targets save: the time of a training step against the share of its tokens that are learned.

    python benchmarks/sft_masking.py benchmarks/results/cpu-sft.jsonl

Rows are packed with conversations of 256 tokens, of which the last ones are the answer. Shares take turns, so that
what else runs on the machine disturbs all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from transformers import PreTrainedModel

from oncelm.models import build_model
from oncelm.utils.environment import environment_report

SHARES = (1.0, 0.5, 0.25, 0.1)
SEQ_LEN, ROWS, CONVERSATION = 1024, 2, 256


def seconds(model: PreTrainedModel, share: float) -> float:
    """Of one forward and backward pass."""
    tokens = torch.randint(4096, (1, ROWS * SEQ_LEN), generator=torch.Generator().manual_seed(0))
    place = torch.arange(ROWS * SEQ_LEN) % CONVERSATION
    labels = tokens.masked_fill(place[None] < (1 - share) * CONVERSATION, -100)
    borders = torch.arange(0, ROWS * SEQ_LEN + 1, CONVERSATION, dtype=torch.int32)
    packed = {"cu_seqlens": borders} if model.config.model_type != "llama" else {}
    if not packed:  # rows of whole conversations are the same to it
        tokens, labels = tokens.view(-1, CONVERSATION), labels.view(-1, CONVERSATION)
    started = time.perf_counter()
    model(input_ids=tokens, labels=labels, use_cache=False, **packed).loss.backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="the JSONL file to append to")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    models = {
        "YOCO gated retention": build_model("yoco-small"),
        "YOCO sliding window": build_model("yoco-small", self_decoder="sliding_window", window_size=128),
        "Llama": build_model("llama-small"),
    }
    environment = environment_report()
    with open(args.results, "a", encoding="utf-8") as results:
        for name, model in models.items():
            model.train()
            times: dict[float, list[float]] = {share: [] for share in SHARES}
            load = os.getloadavg()[0]
            for repeat in range(args.repeats + 1):
                for share in SHARES:
                    taken = seconds(model, share)
                    if repeat:  # the first is a warm-up
                        times[share].append(taken)
            for share, runs in times.items():
                row = {
                    **{"benchmark": "sft_masking", "model": name, "parameters": model.num_parameters()},
                    **{"tokens": ROWS * SEQ_LEN, "learned_share": share, "seconds": statistics.median(runs)},
                    **{"fastest_seconds": min(runs), "share_of_all": min(runs) / min(times[1.0]), "runs": runs},
                    **{"dtype": "float32", "load_before": load, "environment": environment},
                }
                results.write(json.dumps(row) + "\n")
                print(f"{name:<22} {share:>5.0%} learned: {min(runs):.2f} s ({row['share_of_all']:.0%})")


if __name__ == "__main__":
    main()
