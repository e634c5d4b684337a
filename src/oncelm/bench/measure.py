"""Seconds and bytes: how long a call takes, by kernel too, and how much memory it takes beyond what was there."""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity

LONG_RUN = 20.0  # seconds; a call that takes longer is measured once: repeating it costs more than its spread tells
PROFILED = 24  # kernels of a profile that are named, the costliest first
SAMPLING_INTERVAL = 0.002  # seconds between two looks at the resident set


@dataclass(frozen=True)
class Timing:
    """The measured seconds of each repeat."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median; 0 for a single run."""
        return (max(self.runs) - min(self.runs)) / self.median


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run: Callable[[], object], repeats: int, device: torch.device, long_run: float = LONG_RUN) -> Timing:
    """Time `run()`, `repeats` times after one warm-up call.

    A warm-up call longer than `long_run` seconds is itself the figure, and `run` is not called again.
    """
    first = seconds_of(run, device)
    if first > long_run:
        return Timing((first,))
    return Timing(tuple(seconds_of(run, device) for _ in range(repeats)))


def kernel_times(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Milliseconds of all kernels of one more call (on a CPU, of all operators), and [calls, milliseconds] of each."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"  # microseconds
    synchronize(device)
    with torch.profiler.profile(activities=[activity], acc_events=True) as seen:
        run()
        synchronize(device)
    events = [event for event in seen.key_averages() if getattr(event, clock)]
    events.sort(key=lambda event: -getattr(event, clock))
    kernels = {event.key[:90]: [event.count, round(getattr(event, clock) / 1e3, 3)] for event in events[:PROFILED]}
    return {"kernel_milliseconds": sum(getattr(event, clock) for event in events) / 1e3, "kernels": kernels}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


class CpuContention:
    """Context manager: how many cores other processes kept busy meanwhile. Anything above a few percent spoils a timing
    that uses all cores, because a thread that waits for its core makes all the others wait.
    """

    cores: float = 0.0

    def __enter__(self) -> CpuContention:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        self.cores = max(0.0, busy - own) / wall

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: on the clock, of all cores at work, of this process at work."""
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        return time.perf_counter(), busy, own.user + own.system


class PeakMemory:
    """Context manager: the most memory in use at any moment of the block, above what was in use before it.

    On a GPU it is the allocator's own record (max_memory_allocated). On a CPU it is this process's resident set,
    looked at by a thread every 2 ms; memory that was freed earlier but kept by the C library is given back first, or
    the block could use it unseen. Peaks shorter than 2 ms can be missed.

    >>> with PeakMemory(torch.device("cpu")) as peak:
    ...     _ = torch.ones(1 << 22)
    >>> peak.bytes > 0
    True
    """

    bytes: int = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def method(self) -> str:
        """How it was measured, for the record."""
        if self.device.type == "cuda":
            return "torch.cuda.max_memory_allocated above the start"
        return "resident set above the start, sampled every 2 ms"

    def figures(self) -> dict[str, int | str]:
        """What was seen, for the record."""
        return {"peak_bytes_above_weights": self.bytes, "peak_method": self.method}

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        _give_back_freed_memory()
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while True:
            last = self._done.wait(SAMPLING_INTERVAL)
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._start)
            if last:
                return

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
            return
        self._done.set()
        self._sampler.join()


def _give_back_freed_memory() -> None:
    """Return freed pages to the system, where the C library is glibc; others do so by themselves."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
