"""The four measurements. Each takes a target and a length, and returns what was seen as plain JSON values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from oncelm.bench.gate import check_step
from oncelm.bench.measure import PeakMemory, Timing, kernel_times, measure
from oncelm.bench.roofline import Ceilings
from oncelm.bench.targets import Target
from oncelm.models.work import Work
from oncelm.utils.memory import check_memory

WARM_UP_TOKENS = 256
DECODED_TOKENS = 8  # in one repeat of a decode measurement


@dataclass(frozen=True)
class Conditions:
    """What all measurements of a run share.

    Attributes:
        batch_size: sequences side by side.
        repeats: of each timed call.
        dtype: of the computation.
        ceilings: of the machine in that dtype.
        profile: one more call, untimed, gives the milliseconds of each kernel.
    """

    batch_size: int
    repeats: int
    dtype: torch.dtype
    ceilings: Ceilings
    profile: bool = False

    def profiled(self, run: Callable[[], object], device: torch.device) -> dict[str, Any]:
        return kernel_times(run, device) if self.profile else {}


@torch.no_grad()
def prefill(target: Target, length: int, at: Conditions) -> dict[str, Any]:
    """Time from `length` tokens to the logits of the last one and a cache to go on with."""
    ids, device = random_ids(target, at.batch_size, length), target.model.device

    def run() -> object:
        return target.prefill(ids)

    target.prefill(ids[:, :WARM_UP_TOKENS])
    with PeakMemory(device) as peak:
        timing = measure(run, at.repeats, device)
    work = target.work.prefill(at.batch_size, length) if target.work else None
    figures = _timed(timing, 1, at.batch_size * length, work, at)
    return {**figures, **peak.figures(), **at.profiled(run, device)}


@torch.no_grad()
def decode(target: Target, length: int, at: Conditions) -> dict[str, Any]:
    """Time of one token of each sequence behind `length` cached ones."""
    session = target.context(at.batch_size, length, room=DECODED_TOKENS * (at.repeats + 2))
    device = target.model.device
    token = torch.zeros(at.batch_size, 1, dtype=torch.long, device=device)

    def steps() -> None:
        for _ in range(DECODED_TOKENS):
            session.step(token)

    timing = measure(steps, at.repeats, device)
    work = target.work.decode(at.batch_size, length) if target.work else None
    figures = _timed(timing, DECODED_TOKENS, at.batch_size, work, at)
    return {**figures, **at.profiled(steps, device)}


@torch.no_grad()
def memory(target: Target, length: int, at: Conditions) -> dict[str, Any]:
    """Bytes of the cache behind `length` tokens, and the peak of the prefill that fills it."""
    ids = random_ids(target, at.batch_size, length)
    target.prefill(ids[:, :WARM_UP_TOKENS])
    with PeakMemory(target.model.device) as peak:
        session = target.prefill(ids)[1]
    return {
        "cache_bytes": session.nbytes(),
        "weight_bytes": sum(parameter.nbytes for parameter in target.model.parameters()),
        **peak.figures(),
    }


def train(target: Target, length: int, at: Conditions) -> dict[str, Any]:
    """Time of forward, backward and an AdamW step on sequences of `length` tokens; weights stay float32."""
    ids = random_ids(target, at.batch_size, length)
    model = target.model.train()
    mixed = at.dtype != torch.float32

    def backward() -> torch.Tensor:
        with torch.autocast(model.device.type, at.dtype, enabled=mixed):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    errors = {}
    if target.compiled and not target.is_peer:  # a peer's plain form may not even fit
        errors = check_step(target, backward, at.dtype)
    with PeakMemory(model.device) as peak:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if target.compiled:
            step()  # compiles
        timing = measure(step, at.repeats, model.device)
    profile = at.profiled(step, model.device)
    optimizer.zero_grad()
    work = target.work.train(at.batch_size, length) if target.work else None
    figures = _timed(timing, 1, at.batch_size * length, work, at)
    return {**figures, **errors, **peak.figures(), **profile}


CASES: dict[str, Callable[[Target, int, Conditions], dict[str, Any]]] = {
    "prefill": prefill,
    "decode": decode,
    "memory": memory,
    "train": train,
}


def random_ids(target: Target, batch_size: int, length: int) -> torch.Tensor:
    """The same ids [B, T] every time, on the target's device."""
    check_memory(8 * batch_size * length, f"a batch of {batch_size:,} texts of {length:,} tokens", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.model.config.vocab_size, (batch_size, length), generator=generator)
    return ids.to(target.model.device)


def _timed(timing: Timing, units: int, tokens: int, work: Work | None, at: Conditions) -> dict[str, Any]:
    """The figures of a call that does `units` times `work`, if that is known, on `tokens` tokens each time."""
    seconds = timing.median / units
    figures = {
        "seconds": seconds,
        "runs": [run / units for run in timing.runs],
        "repeats": len(timing.runs),
        "spread": timing.spread,
        "tokens_per_second": tokens / seconds,
    }
    if work is None:
        return figures
    floor = at.ceilings.floor_seconds(work)
    return figures | {
        "flops": work.flops,
        "bytes": work.bytes,
        "floor_seconds": floor,
        "mfu": work.flops / seconds / at.ceilings.flops_per_second,
        "mbu": work.bytes / seconds / at.ceilings.bytes_per_second,
        "roofline_share": floor / seconds,  # the larger of the two
    }
