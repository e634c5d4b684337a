"""One replay, from the warm-up to its record."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch

from oncelm.bench.record import Record, circumstances
from oncelm.bench.serve import address, in_process
from oncelm.bench.serve.figures import figures
from oncelm.bench.serve.gate import check_engine
from oncelm.bench.serve.play import Answer
from oncelm.bench.serve.workload import Conversation, Turn
from oncelm.utils.device import resolve_kv_dtype
from oncelm.utils.environment import environment_report
from oncelm.utils.units import size

WARM_UP = Conversation((Turn(64, 4),))
WARM_UP_TOKENS = 2048  # on the engine, which compiles and records what it first meets


def serve_address(
    url: str,
    conversations: Sequence[Conversation],
    workload: str,
    *,
    model: str | None = None,
    headers: dict[str, str] | None = None,
    vocab_size: int,
    seed: int = 0,
    ignore_eos: bool = True,
    timeout: float,
) -> tuple[list[Answer], Record]:
    """Replay on an address that speaks OpenAI's protocol.

    Args:
        url: http://HOST:PORT, or with the path of the API.
        workload: what it is called in the record.
        model: None: the first that the address lists.
        headers: of each request; they do not get into the record.
        vocab_size, seed: of made-up texts.
        ignore_eos, timeout: see `Address`.

    Raises:
        ImportError: aiohttp is not installed.
        ConnectionError: the address does not answer a short request.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise ImportError("measuring an address needs aiohttp: pip install 'oncelm[serve-bench]'") from error
    root = address.api_root(url)

    async def play() -> tuple[str, list[Answer]]:
        name = model or await address.find_model(root, headers or {})
        at = address.Address(root, name, headers or {}, ignore_eos, timeout)
        first_turns = [replace(WARM_UP, turns=(Turn("Once upon a time", 4),)) if conversations[0].is_text else WARM_UP]
        (warm_up,) = await address.replay(at, first_turns, vocab_size=vocab_size, seed=seed + 1, name="warm-up")
        if warm_up.error is not None:
            raise ConnectionError(f"{root} does not complete a prompt: {warm_up.error}")
        return name, await address.replay(at, conversations, vocab_size=vocab_size, seed=seed)

    name, answers = asyncio.run(play())
    settings = {"ignore_eos": ignore_eos, "vocab_size": vocab_size}
    record = {
        "benchmark": "serve",
        "subject": root,
        "model": name,
        "workload": workload,
        "seed": seed,
        "settings": settings,
        **figures(answers),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment_report(),
    }
    return answers, record


def serve_engine(
    llm: Any,
    conversations: Sequence[Conversation],
    workload: str,
    *,
    name: str,
    seed: int = 0,
    ignore_eos: bool = True,
) -> tuple[list[Answer], Record]:
    """Replay on the engine of an `oncelm.LLM`.

    Args:
        workload, name: what it and the model are called in the record.
        seed: of made-up texts.
        ignore_eos: answers are as long as the workload says.

    Raises:
        GateError: the engine's answers are not its model's.
    """
    engine = llm.engine
    model, options = engine.model, asdict(engine.options)
    kv_dtype = resolve_kv_dtype(engine.options.kv_cache_dtype)
    longest = engine.plan.max_model_len
    errors = check_engine(engine, model, kv_dtype, longest)
    vocab_size = model.config.vocab_size
    length = min(WARM_UP_TOKENS, max(one.num_tokens for one in conversations), longest - 4)
    warm_up = Conversation((Turn(max(1, length), 4),))
    in_process.replay(engine, [warm_up], vocab_size=vocab_size, seed=seed + 1, name="warm-up", clock=engine.clock)
    answers = in_process.replay(
        engine, conversations, vocab_size=vocab_size, seed=seed, ignore_eos=ignore_eos, clock=engine.clock
    )
    report = llm.metrics()
    peak = peak_bytes(model.device)
    gauges = report.gauges
    pool = f"; {gauges.pages_total:,} pages, {gauges.slots_total:,} slots" if gauges.slots_total > 1 else ""
    record = {
        "benchmark": "serve",
        "subject": "engine",
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "workload": workload,
        "seed": seed,
        "settings": {**options, "quantization": getattr(model, "quantization", None), "ignore_eos": ignore_eos},
        **figures(answers),
        "metrics": report.as_dict(),
        "peak_bytes": peak,
        "memory": f"peak memory {size(peak)}{pool}",
        **circumstances(model.device, model.dtype, errors, environment_report()),
    }
    return answers, record


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has had: of the GPU, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
