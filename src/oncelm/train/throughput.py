"""Speed of a run between two logs: tokens a second, waiting for data, memory, MFU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch
from transformers import PreTrainedConfig

from oncelm.models.registry import family
from oncelm.train.config import TrainConfig
from oncelm.train.parallel.mesh import Mesh

# Dense bfloat16 products of one GPU, in TFLOP/s, as its maker states them; the first name that a GPU's contains.
PEAK_TFLOPS = {
    **{"B200": 2250.0, "GH200": 989.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0},
    **{"A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0, "A10G": 70.0, "L4": 121.0, "V100": 125.0},
}


class ThroughputMeter:
    """Adds up training steps; what happens between them (evaluations, checkpoints) does not count.

    Args:
        model_config: FLOPs are known of YOCO and Llama; of others they are left out.
    """

    def __init__(self, model_config: PreTrainedConfig, config: TrainConfig, mesh: Mesh) -> None:
        self.config, self.device, self.num_ranks = config, mesh.device, mesh.world.size
        self.peak = config.peak_tflops or peak_tflops(mesh.device, config.dtype)
        work = family(model_config).work(model_config, element_size=4)
        # of whole rows: documents that attend to themselves only, and masked targets, take fewer
        counted = work is not None and not config.masks_documents
        self.flops_per_step = None
        if work is not None and counted:  # pass by pass: the rows of a pass may see each other
            self.flops_per_step = config.grad_accumulation * work.train(config.batch_size, config.seq_len).flops
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around asking for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """What was seen since the last call, of at least one step.

        Returns:
            tokens_per_second: of all ranks. data_wait: the share of this rank's time. memory_gib: the most that this
            rank's GPU had allocated since the last call; on a CPU, what the process holds. tflops: of each rank, as
            the model needs them (`oncelm.models.work`; computing activations again is no gain). mfu: their share of
            what the hardware can do, where that is known.
        """
        values = {
            "tokens_per_second": self._steps * self.config.tokens_per_step / self._seconds,
            "data_wait": self._waited / self._seconds,
            "memory_gib": self._memory() / 2**30,
        }
        if self.flops_per_step is not None:
            values["tflops"] = self._steps * self.flops_per_step / self._seconds / self.num_ranks / 1e12
            if self.peak is not None:
                values["mfu"] = values["tflops"] / self.peak
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return values

    def _memory(self) -> int:
        if self.device.type != "cuda":
            return psutil.Process().memory_info().rss
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def peak_tflops(device: torch.device, dtype: str) -> float | None:
    """What the GPU's maker says of bfloat16; None for others, for a CPU and for float32, where settings decide."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
