"""vLLM's side of `gpu_engine.py`, on the same card in the same session: what its own peer script has no case for.

    PYTHONPATH=/tmp/site python benchmarks/gpu_engine_vllm.py --out vllm.jsonl [--cases itl cached 16x131072]

A Llama of the size of yoco-3b with random weights in bfloat16, prompts of random ids, greedy. A line of JSON a case is
appended at once. Cases, and the seconds they are expected to take on an H200, behind a start of about 95:

    itl          30  inter-token latency of 16 streams behind 8K, undisturbed and while 3 prompts of 128K arrive
    cached       20  the second question on a document of 128K tokens beside the first (prefix caching is on)
    BxN              B prompts of N tokens at once, --new-tokens out each: 16x131072 takes about 100

--batched-tokens is what a step reads at most: fewer keep the pace of streams, more read prompts sooner. It uses
vLLM's public classes only: LLM, SamplingParams, and the LLMEngine of the former.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# before vLLM is imported; what the caller set stays
VLLM_ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_PLUGINS": "",
}
CUDA_GRAPHS = {0: "FULL_DECODE_ONLY", 3: "FULL_AND_PIECEWISE"}  # by compile mode
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 26,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 100288,
    "max_position_embeddings": 1 << 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


class Peer:
    """A vLLM engine, stepped by hand."""

    def __init__(self, folder: str, args: argparse.Namespace, longest: int, most: int) -> None:
        from vllm import LLM

        sizes = [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]
        self.settings = {
            "load_format": "dummy",
            "max_model_len": longest,
            "max_num_seqs": most,
            "max_num_batched_tokens": args.batched_tokens,
            "gpu_memory_utilization": 0.9,
            "enable_prefix_caching": True,
            "compilation_config": {
                "mode": args.compile_mode,
                "cudagraph_mode": CUDA_GRAPHS[args.compile_mode],
                "cudagraph_capture_sizes": sizes,
            },
        }
        self.llm = LLM(folder, skip_tokenizer_init=True, **self.settings)
        self.engine = self.llm.llm_engine
        self._numbers = 0

    def add(self, prompt: list[int], new_tokens: int) -> str:
        from vllm import SamplingParams

        self._numbers += 1
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(self._numbers), {"prompt_token_ids": prompt}, params)
        return str(self._numbers)

    def run(self, times: dict[str, list[float]], wanted: int | None = None) -> None:
        """Steps until nothing is left, or each request in `times` has `wanted` tokens; when each token came."""
        seen = {name: len(moments) for name, moments in times.items()}
        while self.engine.has_unfinished_requests():
            outputs, now = self.engine.step(), time.perf_counter()
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                new = count - seen.get(output.request_id, 0)
                times.setdefault(output.request_id, []).extend([now] * new)
                seen[output.request_id] = count
            if wanted is not None and all(len(moments) >= wanted for moments in times.values()):
                return


def prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng((seed, count, length)).integers(3, vocab_size, (count, length)).tolist()


def figures(values: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"count": len(values), "p50": p50, "p95": p95, "p99": p99, "max": max(values)}


def itl(peer: Peer, args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, form in enumerate(("warm", "undisturbed", "disturbed")):
        names = [peer.add(p, args.stream_tokens) for p in prompts(args.streams, args.behind, vocab_size, number)]
        times: dict[str, list[float]] = {name: [] for name in names}
        peer.run(times, wanted=1)
        since, documents = time.perf_counter(), prompts(3, args.document, vocab_size, 9) if form == "disturbed" else []
        read = [peer.add(document, 1) for document in documents]
        peer.run(times)
        until = max((times[name][-1] for name in read), default=time.perf_counter())
        moments = [sorted({moment for moment in times[name] if since <= moment <= until}) for name in names]
        found[form] = figures([b - a for one in moments for a, b in itertools.pairwise(one)])
    return {
        "streams": args.streams,
        "behind": args.behind,
        "prompts_of": args.document,
        "undisturbed": found["undisturbed"],
        "disturbed": found["disturbed"],
        "p99_by_median": found["disturbed"]["p99"] / found["undisturbed"]["p50"],
    }


def cached(peer: Peer, args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    (document,) = prompts(1, args.document, vocab_size, 5)
    waits = []
    for question in prompts(6, 32, vocab_size, 6):
        start, times = time.perf_counter(), dict[str, list[float]]()
        name = peer.add([*document, *question], 4)
        peer.run(times)
        waits.append(times[name][0] - start)
    second = statistics.median(waits[1:])
    return {
        "document": args.document,
        "first_seconds": waits[0],
        "second_seconds": second,
        "runs": waits[1:],
        "share_of_first": second / waits[0],
    }


def throughput(peer: Peer, args: argparse.Namespace, vocab_size: int, count: int, length: int) -> dict[str, Any]:
    batch = prompts(count, length, vocab_size, 7)
    start, times = time.perf_counter(), dict[str, list[float]]()
    for prompt in batch:
        peer.add(prompt, args.new_tokens)
    peer.run(times)
    seconds = time.perf_counter() - start
    given = sum(map(len, times.values()))
    return {
        "batch_size": count,
        "length": length,
        "new_tokens": args.new_tokens,
        "seconds": seconds,
        "tokens_per_second": given / seconds,
    }


def environment() -> dict[str, Any]:
    """Hardware and versions, without the machine's name or any path."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
        **{package: version(package) for package in ("vllm", "torch", "transformers")},
        "variables": {name: os.environ[name] for name in VLLM_ENVIRONMENT},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--cases", nargs="+", default=["itl", "cached"], help="(itl cached)")
    parser.add_argument("--batched-tokens", type=int, default=16384, help="of one step (16384)")
    parser.add_argument("--compile-mode", type=int, choices=sorted(CUDA_GRAPHS), default=3, help="3: torch.compile (3)")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--stream-tokens", type=int, default=400)
    parser.add_argument("--behind", type=int, default=8192, help="tokens of the prompt of a stream (8192)")
    parser.add_argument("--document", type=int, default=131072, help="tokens of a long prompt (131072)")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="a tiny Llama and few tokens (vLLM for a CPU)")
    args = parser.parse_args()
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    config = LLAMA | SMALL if args.small else LLAMA
    if args.small:
        args.streams, args.stream_tokens, args.behind, args.document, args.batched_tokens = 3, 24, 16, 256, 128
    batches = {name: tuple(map(int, name.split("x"))) for name in args.cases if "x" in name}
    longest = max([args.document, *(length for _, length in batches.values())]) + max(
        args.stream_tokens, args.new_tokens
    )
    most = max([args.streams + 4, *(count for count, _ in batches.values())])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        peer = Peer(folder, args, longest, most)
        made_by = {"model": config, "settings": peer.settings, "environment": environment()}
        vocab_size = int(config["vocab_size"])
        for name in args.cases:
            if name in batches:
                found = throughput(peer, args, vocab_size, *batches[name])
            else:
                found = {"itl": itl, "cached": cached}[name](peer, args, vocab_size)
            print(name, found, flush=True)
            line = json.dumps({"benchmark": "gpu engine, vLLM", "case": name, **found, **made_by})
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
