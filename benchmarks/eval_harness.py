"""Seconds for 5-shot ARC and HellaSwag through lm-eval: our adapter beside lm-eval's own HFLM, on the same YOCO.

    python benchmarks/eval_harness.py data/harness TOKENIZER --questions 8 --out results.jsonl

The data are the folder that `recipes/eval_data.py harness` writes. The weights are random: speed does not depend on
them. Both score the same questions, in turns; nothing is reported unless their log-likelihoods agree to 1e-4. Beside
the wall time stands the process's CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

import oncelm
from oncelm.eval import LanguageModel
from oncelm.eval.harness.adapter import OnceLM
from oncelm.eval.harness.battery import SEED
from oncelm.eval.harness.folder import folder_task
from oncelm.utils.device import resolve_device, resolve_dtype
from oncelm.utils.environment import environment_report

TASKS = "arc_challenge", "hellaswag"
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of questions")
    parser.add_argument("tokenizer", help="bytes, cl100k_base or a path")
    parser.add_argument("--model", default="yoco-160m", help="a preset (yoco-160m)")
    parser.add_argument("--questions", type=int, default=8, help="of each task (8)")
    parser.add_argument("--fewshot", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="HFLM's (16)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", default=None, help="append a JSON line a task")
    args = parser.parse_args()
    tokenizer = oncelm.load_tokenizer(args.tokenizer)
    model = oncelm.build_model(args.model, vocab_size=len(tokenizer))
    model = model.to(resolve_device(args.device), resolve_dtype(args.dtype)).eval()
    language_model = LanguageModel(model, tokenizer, args.model)
    scorers = {
        "oncelm": OnceLM(language_model),
        "hflm": HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=language_model.longest
        ),
    }
    for name in TASKS:
        task = folder_task(args.data, name, args.fewshot)
        task.set_fewshot_seed(SEED)
        task.build_all_requests(limit=args.questions)
        wall: dict[str, list[float]] = {scorer: [] for scorer in scorers}
        cpu: dict[str, list[float]] = {scorer: [] for scorer in scorers}
        answers: dict[str, list[tuple[float, bool]]] = {}
        for _ in range(args.repeats):
            for scorer, lm in scorers.items():
                start, start_cpu = time.perf_counter(), time.process_time()
                answers[scorer] = lm.loglikelihood(task.instances, disable_tqdm=True)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                wall[scorer].append(time.perf_counter() - start)
                cpu[scorer].append(time.process_time() - start_cpu)
        error = max(abs(a[0] - b[0]) for a, b in zip(*answers.values(), strict=True))
        alike = all(a[1] == b[1] for a, b in zip(*answers.values(), strict=True))
        if error > TOLERANCE or not alike:
            raise SystemExit(f"{name}: the two disagree by {error:.2e}; no time is reported.")
        middle = {scorer: (statistics.median(wall[scorer]), statistics.median(cpu[scorer])) for scorer in scorers}
        record: dict[str, Any] = {
            "benchmark": "eval harness",
            "task": name,
            "fewshot": args.fewshot,
            "questions": args.questions,
            "requests": len(task.instances),
            "tokens": sum(len(tokenizer.encode("".join(request.args))) for request in task.instances),
            "seconds": wall,
            "cpu_seconds": cpu,
            "speedup": middle["hflm"][0] / middle["oncelm"][0],
            "speedup_cpu_time": middle["hflm"][1] / middle["oncelm"][1],
            "largest_difference": error,
            "model": args.model,
            "vocabulary": len(tokenizer),
            "dtype": args.dtype,
            "hflm_batch_size": args.batch_size,
            "device": str(model.device),
            "load_average": os.getloadavg()[0],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment_report(),
        }
        print(
            f"{name}: {record['requests']} requests, {record['tokens']:,} tokens; oncelm {middle['oncelm'][0]:.2f} s, "
            f"HFLM {middle['hflm'][0]:.2f} s: {record['speedup']:.2f} times, {record['speedup_cpu_time']:.2f} by CPU "
            f"time; largest difference {error:.1e}; load {record['load_average']:.1f}"
        )
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
