"""The engine on one GPU: many requests of 8K to 128K tokens, sequences held at once, and what a user waits for.

    python benchmarks/gpu_engine.py --out engine.jsonl [--cases gate 32x32K ...] [--limit 280] [--small]

A 3B YOCO with random weights in bfloat16, prompts of random ids, greedy, every answer as long as it was asked for. A
line of JSON a case is appended at once, so that nothing is lost where time runs out. Cases, in this order, and the
seconds that an H200 is expected to need for each; besides, half a minute to compile at the first long prompt and again
in float8, and a few seconds for each of the six engines:

    bare             13  the model without an engine: prefill of 512K tokens, a step of 16 sequences behind 32K
    gate              2  the engine's answers against the model's forward pass; nothing else runs if this fails
    32x32K           11  requests x prompt, 256 tokens out each, all at once
    64x8K             6
    16x128K          20
    decode            4  milliseconds a step of 16 requests behind 32K, beside bare
    ttft              7  time to first token of one prompt of 512K tokens, beside bare
    cached            3  the second question on a document of 128K tokens beside the first
    itl              15  inter-token latency of 16 streams behind 8K, undisturbed and while three prompts of 128K tokens
                         are read, in pieces (max_prefill_tokens_beside_decodes) of 1,024 and 2,048 tokens
    held             15  sequences of 128K tokens held at once: all admitted, and steps over all of them. Their prompts
                         are not computed (that would take minutes): keys and values are zeros
    float8:32x32K     8  the same with keys and values and the products of prompts in float8
    float8:64x8K      5
    float8:16x128K   15
    float8:held      12

vLLM's side of it is `gpu_engine_vllm.py`. --small runs all of it on a CPU within a minute or two, at tiny sizes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oncelm import bench
from oncelm.bench.measure import seconds_of, synchronize
from oncelm.bench.serve.gate import check_engine
from oncelm.engine.llm import LLM
from oncelm.engine.metrics import Distribution, distribution
from oncelm.engine.outputs import RequestOutput
from oncelm.engine.params import SamplingParams
from oncelm.models import describe
from oncelm.models.load import set_execution
from oncelm.models.resolve import fresh
from oncelm.utils.environment import environment_report

WARM_UP = 0.25  # of the prompts' tokens are read before, for what is compiled and recorded at the first use


@dataclass(frozen=True)
class Sizes:
    """Tokens and sequences; by `small` those of a trial on a CPU."""

    model: str = "yoco-3b"
    batches: tuple[tuple[int, int], ...] = ((32, 32768), (64, 8192), (16, 131072))
    new_tokens: int = 256
    streams: int = 16
    stream_prompt: int = 8192
    stream_tokens: int = 400
    behind: int = 32768
    steps: int = 64
    document: int = 131072
    longest: int = 524288
    held: int = 131072
    most_held: int = 240
    pieces: tuple[int, ...] = (1024, 2048)  # tokens of prompts beside rows, where streams shall keep their pace
    page_size: int | None = None


SMALL = Sizes(
    "yoco-tiny", ((4, 64), (8, 32), (2, 160)), 4, 3, 16, 24, 64, 8, 256, 512, 128, 6, pieces=(16, 32), page_size=16
)


class OutOfTime(Exception):
    """A case would run beyond --limit."""


class Bench:
    """A model, and one engine on it at a time.

    Attributes:
        llm, options: the engine, and what it was made with.
        bare: seconds of the model without an engine, by what was done.
    """

    def __init__(self, sizes: Sizes, device: torch.device, limit: float, out: Path, small: bool) -> None:
        self.sizes, self.device, self.out, self.small = sizes, device, out, small
        self.start, self.limit = time.perf_counter(), limit
        self.environment = environment_report()
        dtype = torch.float32 if small else torch.bfloat16
        self.model = fresh(describe(sizes.model), device, dtype).eval()
        self.execution: tuple[bool, str | None] = (False, None)
        self.llm: LLM | None = None
        self.options: dict[str, Any] = {}
        self.bare: dict[str, float] = {}
        self._numbers = 0

    def write(self, case: str, **figures: Any) -> None:
        elapsed = round(time.perf_counter() - self.start, 1)
        print(f"[{elapsed:6.1f} s] {case} {figures}", flush=True)
        record = {
            "benchmark": "gpu engine", "case": case, **figures, "model": self.sizes.model, "options": self.options,
            "compiled": self.execution[0], "quantization": self.execution[1], "small": self.small,
            "dtype": str(self.model.dtype).removeprefix("torch."), "elapsed": elapsed,
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "environment": self.environment,
        }  # fmt: skip
        bench.append_record(self.out, record)

    def check_time(self) -> None:
        if time.perf_counter() - self.start > self.limit:
            raise OutOfTime(f"beyond --limit {self.limit:g} s")

    def execute(self, float8: bool) -> None:
        """How the model multiplies: compiled on a GPU, prompts in float8 if asked for."""
        on_gpu = self.device.type == "cuda"
        execution = (on_gpu, "float8" if float8 and on_gpu else None)
        if execution != self.execution:
            set_execution(self.model, self.sizes.model, *execution)
            self.execution = execution

    def engine(self, float8: bool = False, **options: Any) -> LLM:
        """The engine with these options: the one that is there, if it has them."""
        options = {"enable_prefix_caching": False, **options}
        if float8:
            options["kv_cache_dtype"] = "float8"
        if self.sizes.page_size:
            options["page_size"] = self.sizes.page_size
        if self.small:
            options["kv_cache_bytes"] = 1 << 27
        execution = (self.device.type == "cuda", "float8" if float8 and self.device.type == "cuda" else None)
        if self.llm is None or options != self.options or execution != self.execution:
            self.close()
            self.execute(float8)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            self.llm = LLM(self.model, **options)
            self.options = options
            print(f"engine up in {time.perf_counter() - start:.1f} s: {options}", flush=True)
        return self.llm

    def close(self) -> None:
        if self.llm is not None:
            self.llm.close()
        self.llm = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompts(self, count: int, length: int, seed: int = 0) -> list[list[int]]:
        draw = np.random.default_rng((seed, count, length))
        return draw.integers(3, self.model.config.vocab_size, (count, length)).tolist()

    def add(self, prompt: Sequence[int], new_tokens: int) -> str:
        """Queue a request; its name."""
        assert self.llm is not None
        self._numbers += 1
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self.llm.engine.add_request(str(self._numbers), prompt, params)
        return str(self._numbers)

    def run(self, until: Callable[[], bool] = lambda: False) -> dict[str, RequestOutput]:
        """Steps until nothing is left, or `until` says so; the outputs by name, finished or not.

        Raises:
            OutOfTime, RuntimeError: a request failed.
        """
        assert self.llm is not None
        engine, outputs = self.llm.engine, {}
        while engine.has_unfinished() and not until():
            self.check_time()
            for output in engine.step():
                outputs[output.request_id] = output
                if (error := output.outputs[0].error) is not None:
                    raise RuntimeError(f"request {output.request_id}: {error}")
        return outputs

    def abort_all(self, names: Sequence[str]) -> None:
        assert self.llm is not None
        for name in names:
            self.llm.engine.abort_request(name)
        self.run()


def case_bare(at: Bench) -> None:
    """Prefill and steps of the model alone, before an engine takes the memory."""
    sizes = at.sizes
    at.execute(False)
    target = bench.OwnTarget(at.model, compile=at.execution[0])
    longest = torch.tensor(at.prompts(1, sizes.longest), device=at.device)
    many = torch.tensor(at.prompts(sizes.streams, sizes.behind), device=at.device)
    with torch.no_grad():
        runs = [seconds_of(lambda: target.prefill(longest), at.device) for _ in range(3)]  # the first one compiles
        at.bare["prefill"] = min(runs)
        session = target.prefill(many, room=2 * sizes.steps + 8)[1]
        token = torch.zeros(sizes.streams, 1, dtype=torch.long, device=at.device)

        def steps() -> None:
            for _ in range(sizes.steps):
                session.step(token)

        steps()  # records the graph
        at.bare["step"] = seconds_of(steps, at.device) / sizes.steps
    at.write("bare", prefill_tokens=sizes.longest, prefill_seconds=at.bare["prefill"], prefill_runs=runs,
             sequences=sizes.streams, behind=sizes.behind, step_milliseconds=at.bare["step"] * 1e3)  # fmt: skip


def usual(at: Bench, float8: bool = False) -> LLM:
    """The engine of most cases."""
    longest = max(length for _, length in at.sizes.batches) + at.sizes.new_tokens
    return at.engine(float8, max_num_seqs=max(count for count, _ in at.sizes.batches), max_model_len=longest)


def case_gate(at: Bench, float8: bool = False) -> None:
    llm = usual(at, float8)
    kv_dtype = torch.float8_e4m3fn if float8 else None
    errors = check_engine(llm.engine, at.model, kv_dtype)
    plan = llm.engine.plan
    at.write("gate", errors=errors, plan={**asdict(plan), "tokens": plan.num_tokens})


def throughput(count: int, length: int, float8: bool) -> Callable[[Bench], None]:
    def case(at: Bench) -> None:
        usual(at, float8)
        prompts = at.prompts(count, length)
        warm(at, length)
        synchronize(at.device)
        start = time.perf_counter()
        for prompt in prompts:
            at.add(prompt, at.sizes.new_tokens)
        outputs = at.run()
        seconds = time.perf_counter() - start
        given = [len(output.outputs[0].token_ids) for output in outputs.values()]
        assert given == [at.sizes.new_tokens] * count, given
        assert at.llm is not None
        report = at.llm.metrics().as_dict()
        at.write(
            case_name(count, length, float8), batch_size=count, length=length, new_tokens=at.sizes.new_tokens,
            seconds=seconds, tokens_per_second=sum(given) / seconds,
            last_first_token=max(output.metrics.first_token_time - output.metrics.arrival_time
                                 for output in outputs.values()),
            metrics=report, **memory(at),
        )  # fmt: skip

    return case


def warm(at: Bench, length: int) -> None:
    """Read some tokens of such a length, and write a few, so that nothing is compiled within the measurement."""
    for prompt in at.prompts(2, max(8, int(length * WARM_UP)), seed=1):
        at.add(prompt, 4)
    at.run()


def memory(at: Bench) -> dict[str, int]:
    return {"peak_bytes": torch.cuda.max_memory_allocated()} if at.device.type == "cuda" else {}


def case_decode(at: Bench) -> None:
    """Steps in which all requests write and none is read."""
    sizes = at.sizes
    usual(at)
    names = [at.add(prompt, 4 * sizes.steps) for prompt in at.prompts(sizes.streams, sizes.behind)]
    at.run(until=lambda: all_write(at, names))
    for _ in range(sizes.steps // 4):
        at.llm.engine.step()  # type: ignore[union-attr]
    synchronize(at.device)
    start = time.perf_counter()
    for _ in range(sizes.steps):
        at.llm.engine.step()  # type: ignore[union-attr]
    synchronize(at.device)
    step = (time.perf_counter() - start) / sizes.steps
    at.abort_all(names)
    beside = {"beside_bare": step / at.bare["step"]} if "step" in at.bare else {}
    at.write("decode", sequences=sizes.streams, behind=sizes.behind, step_milliseconds=step * 1e3, **beside)


def all_write(at: Bench, names: Sequence[str]) -> bool:
    """Whether each of these requests has given a token."""
    assert at.llm is not None
    return len(at.llm.engine.scheduler.running) == len(names) and all(
        request.num_output_tokens for request in at.llm.engine.scheduler.running
    )


def case_ttft(at: Bench) -> None:
    sizes = at.sizes
    at.engine(max_num_seqs=4, max_model_len=sizes.longest + 16)
    (prompt,) = at.prompts(1, sizes.longest)
    warm(at, sizes.longest // 8)
    runs = []
    for _ in range(2):
        (output,) = (at.add(prompt, 1), at.run())[1].values()
        runs.append(output.metrics.first_token_time - output.metrics.arrival_time)
    beside = {"beside_bare": min(runs) / at.bare["prefill"]} if "prefill" in at.bare else {}
    at.write("ttft", length=sizes.longest, seconds=min(runs), runs=runs, **beside)


def case_cached(at: Bench) -> None:
    """A document that was read before: what further questions on it wait for."""
    sizes = at.sizes
    llm = at.engine(max_num_seqs=4, max_model_len=sizes.document + 256, enable_prefix_caching=True)
    warm(at, sizes.document)
    document, *others = at.prompts(1, sizes.document), *at.prompts(6, 32, seed=2)
    text = document[0]

    def ask(question: list[int]) -> tuple[float, float, int]:
        start = time.perf_counter()
        name = at.add([*text, *question], 4)
        output = at.run()[name]
        waited = output.metrics.first_token_time - output.metrics.arrival_time
        return waited, time.perf_counter() - start, output.num_cached_tokens

    first = ask(others[0])  # reads all of it
    start = time.perf_counter()
    llm.read(text)
    read = time.perf_counter() - start
    further = [ask(question) for question in others[1:]]
    second = statistics.median(waited for waited, _, _ in further)
    at.write("cached", document=sizes.document, first_seconds=first[0], read_seconds=read, second_seconds=second,
             runs=[waited for waited, _, _ in further], cached_tokens=[cached for _, _, cached in further],
             share_of_first=second / first[0])  # fmt: skip


def case_itl(at: Bench) -> None:
    """Streams by themselves, then with long prompts that come at once, in pieces of several sizes beside them."""
    sizes = at.sizes
    llm = at.engine(max_num_seqs=sizes.streams + 4, max_model_len=sizes.document + sizes.stream_tokens)
    scheduler = llm.engine.scheduler
    most = scheduler.max_prefill_tokens_beside_decodes
    warm(at, sizes.document // 8)

    def intervals(documents: list[list[int]], piece: int) -> Distribution:
        names = [at.add(prompt, sizes.stream_tokens) for prompt in at.prompts(sizes.streams, sizes.stream_prompt)]
        outputs = at.run(until=lambda: all_write(at, names))
        scheduler.max_prefill_tokens_beside_decodes = piece
        since = time.monotonic()
        read = [at.add(document, 1) for document in documents]
        outputs |= at.run()
        scheduler.max_prefill_tokens_beside_decodes = most
        until = max([outputs[name].metrics.finished_time for name in read], default=time.monotonic())
        times = [outputs[name].metrics.token_times for name in names]
        found = distribution(b - a for one in times for a, b in itertools.pairwise(one) if since <= a and b <= until)
        assert found is not None
        return found

    undisturbed = intervals([], most)
    documents = at.prompts(3, sizes.document, seed=3)
    for piece in sizes.pieces:
        disturbed = intervals(documents, piece)
        at.write("itl", streams=sizes.streams, behind=sizes.stream_prompt, prompts_of=sizes.document, piece=piece,
                 undisturbed=asdict(undisturbed), disturbed=asdict(disturbed),
                 p99_by_median=disturbed.p99 / undisturbed.p50)  # fmt: skip


def held(float8: bool) -> Callable[[Bench], None]:
    def case(at: Bench) -> None:
        """As many long sequences as the memory holds, admitted by the scheduler and decoded."""
        sizes = at.sizes
        tokens = sizes.held + 4 * sizes.steps
        llm = at.engine(float8, max_num_seqs=sizes.most_held, max_model_len=tokens, num_snapshots=0)
        engine = llm.engine
        plan, page_size = engine.plan, engine.plan.page_size
        count = min(sizes.most_held, (plan.num_pages - 1) // -(-tokens // page_size))
        logits = torch.zeros(count, at.model.config.vocab_size, device=at.device)
        runner, engine.runner = engine.runner, _Skip(engine.runner, logits)
        engine.scheduler.max_num_batched_tokens = 1 << 40  # nothing is computed
        engine.scheduler.max_prefill_tokens_beside_decodes = 1 << 40
        (prompt,) = at.prompts(1, sizes.held)
        names = [at.add(prompt, 4 * sizes.steps) for _ in range(count)]
        at.run(until=lambda: all_write(at, names))
        engine.step()
        engine.runner = runner
        engine.step()  # warm
        synchronize(at.device)
        start, steps = time.perf_counter(), 4
        for _ in range(steps):
            engine.step()
        synchronize(at.device)
        seconds = (time.perf_counter() - start) / steps
        preempted = sum(request.output.metrics.num_preemptions for request in engine.scheduler.running)
        running = len(engine.scheduler.running)
        at.abort_all(names)
        assert (running, preempted) == (count, 0), (running, preempted)
        at.write("float8:held" if float8 else "held", sequences=count, tokens=sizes.held, step_seconds=seconds,
                 plan=asdict(plan), **memory(at))  # fmt: skip
        at.close()

    return case


class _Skip:
    """In the runner's place: nothing is computed."""

    def __init__(self, runner: Any, logits: torch.Tensor) -> None:
        self.keep, self.logits = runner.keep, logits

    def prefill(self, pieces: Sequence[Any]) -> list[None]:
        return [None] * len(pieces)

    def decode(self, rows: Sequence[Any]) -> torch.Tensor:
        return self.logits[: len(rows)]

    def keep(self, rows: Sequence[Any], tokens: torch.Tensor) -> None:
        pass


def case_name(count: int, length: int, float8: bool) -> str:
    shown = f"{length // 1024}K" if length % 1024 == 0 else str(length)
    return f"{'float8:' if float8 else ''}{count}x{shown}"


def cases(sizes: Sizes) -> dict[str, Callable[[Bench], None]]:
    """All of them, in order."""
    exact, float8 = (
        {case_name(*batch, eight): throughput(*batch, eight) for batch in sizes.batches} for eight in (False, True)
    )
    return {
        "bare": case_bare,
        "gate": case_gate,
        **exact,
        "decode": case_decode,
        "ttft": case_ttft,
        "cached": case_cached,
        "itl": case_itl,
        "held": held(False),
        "float8:gate": lambda at: case_gate(at, True),
        **float8,
        "float8:held": held(True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="these only, and the gate (default: all)")
    parser.add_argument(
        "--limit", type=float, default=280, help="seconds after which nothing is begun or goes on (280)"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes on a CPU, to see whether this runs")
    args = parser.parse_args()
    sizes = SMALL if args.small else Sizes()
    known = cases(sizes)
    for name in args.cases or ():
        if name not in known:
            parser.error(f"unknown case {name}; there are {', '.join(known)}")
    chosen = [name for name in known if not args.cases or name in args.cases or name == "gate"]
    at = Bench(sizes, torch.device("cpu" if args.small else "cuda"), args.limit, args.out, args.small)
    print(f"model up in {time.perf_counter() - at.start:.1f} s", flush=True)
    for name in chosen:
        try:
            at.check_time()
            known[name](at)
        except bench.GateError:
            raise
        except Exception as error:  # one case must not cost the others
            traceback.print_exc()
            at.write(name, failure=f"{type(error).__name__}: {error}"[:500])
            at.close()  # what it left running


if __name__ == "__main__":
    main()
