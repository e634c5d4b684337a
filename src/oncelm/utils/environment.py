"""What a measurement was made on: hardware and versions, without the machine's name or any path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("oncelm", "torch", "transformers", "triton")

# Instruction sets that decide how fast matrices multiply, as Linux names them.
INSTRUCTION_SETS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip


def environment_report() -> dict[str, Any]:
    """The environment as plain JSON values.

    Returns:
        cpu: model name; cores: those this process may use; threads: torch's; instruction_sets: of INSTRUCTION_SETS,
        those the CPU has; memory_bytes: of the machine; gpus: name and memory_bytes of each; driver, cuda: of the
        GPUs, or None; python, oncelm, torch, transformers, triton: versions (None: not installed); platform.
    """
    cpu, flags = _cpu()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "driver": _driver() if gpus else None,
        "cuda": torch.version.cuda if gpus else None,
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> tuple[str, set[str]]:
    """Model name and feature flags; flags are known on Linux only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name") or platform.processor() or platform.machine(), flags


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _driver() -> str | None:
    """The GPU driver's version, as nvidia-smi says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip() or None


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
