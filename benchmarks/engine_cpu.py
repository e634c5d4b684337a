"""Many requests on a CPU: `oncelm.LLM` beside transformers' `generate` in a loop; and what the scheduler costs.

    python benchmarks/engine_cpu.py --out benchmarks/results/cpu-engine.jsonl [--small]

    throughput  16 requests of mixed lengths, greedy: the engine, then `generate` one request after the other on the
                same model, then on transformers' Llama of the same shape. First the engine must give generate's tokens.
    overhead    64 requests that write: milliseconds a step in which the engine plans, and deals with tokens, beside
                those of the model and of the sampler (choose, read); on the real model, and with one in its place
                that does nothing, to be compared with 10 ms, a step of 3B on an H200.

The forms take turns, so that a busy machine is busy for all of them; CPU seconds, which it disturbs less, are measured
too. One line of JSON a part, with the environment.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from oncelm import bench
from oncelm.bench.measure import CpuContention
from oncelm.bench.serve.generate import generate as draw
from oncelm.engine.llm import LLM
from oncelm.engine.params import SamplingParams
from oncelm.models.resolve import describe, fresh
from oncelm.utils.environment import environment_report

WORKLOAD = "uniform:requests=16,input=32-1K,output=64-256"
SMALL_WORKLOAD = "uniform:requests=4,input=8-64,output=4-8"
WARM_UP_TOKENS = 16  # of each answer in the gate, which also warms
GPU_STEP = 0.010  # seconds of a decode step of 3B, 64 sequences behind 8K, on an H200
GOAL_RATIO, GOAL_SHARE = 3.0, 0.05


class Requests:
    """Prompts of random ids and the lengths of their answers."""

    def __init__(self, workload: str, vocab_size: int, longest: int = 1 << 20) -> None:
        turns = [conversation.turns[0] for conversation in draw(workload)]
        self.turns = [replace(turn, output=min(turn.output, longest)) for turn in turns]
        generator = torch.Generator().manual_seed(0)
        self.prompts = [
            torch.randint(vocab_size, (int(turn.input),), generator=generator).tolist() for turn in self.turns
        ]
        self.params = [greedy(turn.output) for turn in self.turns]

    @property
    def output_tokens(self) -> int:
        return sum(turn.output for turn in self.turns)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)


def by_engine(llm: LLM, requests: Requests) -> list[list[int]]:
    outputs = llm.generate(requests.prompts, requests.params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def by_generate(model: Any, requests: Requests) -> list[list[int]]:
    """One request after the other."""
    answers = []
    for prompt, turn in zip(requests.prompts, requests.turns, strict=True):
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=turn.output,
            min_new_tokens=turn.output,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def throughput(config: Any, workload: str, rounds: int, write: Callable[..., None]) -> None:
    """Seconds of all requests, of each form."""
    model = fresh(config, torch.device("cpu"), torch.float32).eval()
    llama = fresh(bench.llama_config(config), torch.device("cpu"), torch.float32).eval()
    for one in (model, llama):
        one.generation_config.eos_token_id = None
    requests = Requests(workload, config.vocab_size)
    llm = LLM(model, max_num_seqs=16, enable_prefix_caching=False, verbose=False)
    forms: dict[str, Callable[[], list[list[int]]]] = {
        "engine": lambda: by_engine(llm, requests),
        "generate": lambda: by_generate(model, requests),
        "generate of Llama": lambda: by_generate(llama, requests),
    }
    short = Requests(workload, config.vocab_size, WARM_UP_TOKENS)
    by_generate(llama, short)
    pairs = zip(by_engine(llm, short), by_generate(model, short), strict=True)
    if wrong := [number for number, (ours, theirs) in enumerate(pairs) if ours != theirs]:
        raise bench.GateError(f"requests {wrong}: the engine's tokens are not generate's.")
    runs: dict[str, list[float]] = {name: [] for name in forms}
    cpu_runs: dict[str, list[float]] = {name: [] for name in forms}
    busy = []
    for _ in range(rounds):
        for name, run in forms.items():
            with CpuContention() as others:
                start, cpu = time.perf_counter(), time.process_time()
                run()
                runs[name].append(time.perf_counter() - start)
                cpu_runs[name].append(time.process_time() - cpu)
            busy.append(others.cores)
    medians = {name: statistics.median(found) for name, found in runs.items()}
    cpu_medians = {name: statistics.median(found) for name, found in cpu_runs.items()}
    for name, seconds in medians.items():
        write(
            "throughput",
            form=name,
            workload=workload,
            prompt_tokens=sum(map(len, requests.prompts)),
            output_tokens=requests.output_tokens,
            seconds=seconds,
            runs=runs[name],
            output_tokens_per_second=requests.output_tokens / seconds,
            cpu_seconds=cpu_medians[name],
            times_engine=seconds / medians["engine"],
            times_engine_in_cpu_seconds=cpu_medians[name] / cpu_medians["engine"],
            goal=GOAL_RATIO,
            cores_busy_elsewhere=round(statistics.median(busy), 2),
            parameters=sum(p.numel() for p in (llama if "Llama" in name else model).parameters()),
        )


class Clock:
    """Seconds of `now` within some calls, by name; a call within another counts for the outer one only."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}
        self._inside = False

    @contextmanager
    def watch(self, parts: dict[str, tuple[Any, str]]) -> Iterator[None]:
        """Time the callable (object, attribute) under each name, within the block."""
        before = {name: getattr(owner, attribute) for name, (owner, attribute) in parts.items()}
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, self._timed(name, before[name]))
        try:
            yield
        finally:
            for name, (owner, attribute) in parts.items():
                setattr(owner, attribute, before[name])

    def _timed(self, name: str, call: Callable) -> Callable:
        self.seconds[name] = 0.0

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside, start = True, self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[name] += self.now() - start

        return run


class Nothing:
    """In a runner's place: the same logits for every row."""

    def __init__(self, vocab_size: int, most: int) -> None:
        self.logits = torch.zeros(most, vocab_size)
        self.logits[:, 1] = 1.0

    def prefill(self, pieces: Sequence[Any]) -> list[None]:
        return [None] * len(pieces)

    def decode(self, rows: Sequence[Any]) -> torch.Tensor:
        return self.logits[: sum(row.num_logits for row in rows)]

    def keep(self, rows: Sequence[Any], tokens: torch.Tensor) -> None:
        pass


def overhead(config: Any, sequences: int, steps: int, rounds: int, write: Callable[..., None]) -> None:
    """Milliseconds of the parts of a decode step."""
    model = fresh(config, torch.device("cpu"), torch.float32).eval()
    for form in ("model", "nothing"):
        llm = LLM(model, max_num_seqs=sequences, enable_prefix_caching=False, verbose=False, max_model_len=1024)
        engine = llm.engine
        if form == "nothing":
            engine.runner = Nothing(config.vocab_size, sequences)
        parts = {
            "schedule": (engine.scheduler, "schedule"),
            "model": (engine.runner, "decode"),
            "choose": (engine.sampler, "choose"),
            "read": (engine.sampler, "read"),
        }
        found: list[dict[str, float]] = []
        for number in range(rounds + 1):  # the first warms
            for i in range(sequences):
                engine.add_request(f"{number}.{i}", [1 + i % 7, 2, 3, 4, 5], greedy(steps + 4))
            for _ in range(3):
                engine.step()  # prompts are read, all write
            # without a model all is done by this thread, whose own time others do not disturb
            clock = Clock(time.perf_counter if form == "model" else time.thread_time)
            with clock.watch(parts):
                start = clock.now()
                for _ in range(steps):
                    engine.step()
                whole = clock.now() - start
            while engine.has_unfinished():
                engine.step()
            seconds = {**clock.seconds, "rest": whole - sum(clock.seconds.values())}
            found.append({name: value / steps * 1e3 for name, value in seconds.items()})
        medians = {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}
        own = medians["schedule"] + medians["rest"]
        whole = sum(medians.values())
        write(
            "overhead",
            form=form,
            sequences=sequences,
            milliseconds=medians,
            engine_milliseconds=own,
            step_milliseconds=whole,
            share_of_this_step=own / whole,
            share_of_a_gpu_step=own / (GPU_STEP * 1e3),
            goal=GOAL_SHARE,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens: to see whether this runs")
    parser.add_argument("--parts", nargs="+", choices=("throughput", "overhead"), default=("throughput", "overhead"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workload", help=f"of the throughput, as of `oncelm bench serve` ({WORKLOAD})")
    args = parser.parse_args()
    if args.small:
        config = describe("yoco-tiny")
    else:  # 26M parameters: the model that finds needles (recipes/needles)
        sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4, "num_key_value_heads": 4}
        config = describe("yoco-small", num_self_heads=2, max_position_embeddings=4096, **sizes)
    environment = environment_report()

    def write(part: str, **figures: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        print(part, figures, flush=True)
        line = {"benchmark": f"engine {part}", **figures, "dtype": "float32", "small": args.small}
        bench.append_record(args.out, {**line, "time": time, "environment": environment})

    if "throughput" in args.parts:
        workload = args.workload or (SMALL_WORKLOAD if args.small else WORKLOAD)
        throughput(config, workload, args.rounds, write)
    if "overhead" in args.parts:
        overhead(config, 8 if args.small else 64, 10 if args.small else 100, args.rounds, write)


if __name__ == "__main__":
    main()
