"""The device mesh of a run, the position of this process in it, and what all processes agree on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from oncelm.utils.device import resolve_device

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # for what one rank does while the others wait: preparing data, writing a checkpoint


@dataclass(frozen=True)
class MeshDim:
    """A rank's place along one dimension of the mesh: number `index` of `size`."""

    index: int
    size: int


_ONLY = MeshDim(0, 1)


@dataclass(frozen=True)
class Mesh:
    """The device mesh of a run, seen from this rank.

    Attributes:
        device: this rank's own.
        world: this rank among all of them.
        data: which rows of a batch it takes.
        context: which part of each row it takes.
        tensor: which part of each layer it computes.
        device_mesh: ("shard", "tensor"), shard being data and context together; None for a lone rank.
        context_group: the ranks that share this rank's rows, in the order of their chunks.
        control: for messages between the ranks' Python code; on the CPU.
        saving: the same, for checkpoints that are written while training goes on.
    """

    device: torch.device
    world: MeshDim = _ONLY
    data: MeshDim = _ONLY
    context: MeshDim = _ONLY
    tensor: MeshDim = _ONLY
    device_mesh: DeviceMesh | None = None
    context_group: ProcessGroup | None = None
    control: ProcessGroup | None = None
    saving: ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """The one rank that reports."""
        return self.world.index == 0

    @property
    def shards(self) -> int:
        """Ranks whose losses and gradients add up to the step's."""
        return self.data.size * self.context.size

    def rows(self, count: int) -> slice:
        """This rank's rows of a batch of `count`, a multiple of data.size."""
        share = count // self.data.size
        return slice(self.data.index * share, (self.data.index + 1) * share)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks that see different tokens."""
        if self.device_mesh is not None:
            dist.all_reduce(values, group=self.device_mesh.get_group("shard"))
        return values

    def agree(self, stop: bool, export: bool, seconds: float) -> tuple[bool, bool, float]:
        """Whether any rank has to stop, or is asked to export, and the first rank's clock: the same on all ranks."""
        if self.control is None:
            return stop, export, seconds
        values = torch.tensor([float(stop), float(export), seconds if self.is_main else 0.0], dtype=torch.float64)
        dist.all_reduce(values, group=self.control)
        return bool(values[0] > 0), bool(values[1] > 0), float(values[2])

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, on all of them."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first rank, on all ranks; the first rank alone runs it.

        If it raises there, the other ranks end silently (SystemExit, status 2): the first one says why.
        """
        if not self.is_main:
            answer = broadcast(None, self.control)
            if answer is None:
                raise SystemExit(2)
            return answer[0]
        try:
            value = function()
        except BaseException:
            broadcast(None, self.control)
            raise
        broadcast([value], self.control)
        return value

    def main_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on each rank: run on the first alone, then on all others, which find its files."""
        mine: list[T] = []
        self.on_main(lambda: mine.append(function()))
        return mine[0] if mine else function()


def broadcast(value: Any, group: ProcessGroup | None) -> Any:
    """The group's first rank's `value`, on all of them."""
    values = [value]
    if group is not None:
        dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


@contextlib.contextmanager
def join_mesh(device: str, *, tensor: int = 1, context: int = 1) -> Iterator[Mesh]:
    """Meet the other ranks that torchrun started, if there are any, and part from them at the end.

    Args:
        device: "auto", "cpu", "cuda", ...; with several ranks on GPUs, each takes the one of its local number.
        tensor: ranks that split each layer.
        context: ranks that split each sequence. What remains, ranks / (tensor * context), splits the rows of a batch.

    Raises:
        ValueError: the number of ranks is not a multiple of tensor * context.
        ConnectionError: another rank was lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % (tensor * context):
        raise ValueError(
            f"tensor_parallel {tensor} times context_parallel {context} must divide the number of processes, {size}; "
            f"start a multiple of {tensor * context} with torchrun --nproc-per-node, or set them lower."
        )
    resolved = resolve_device(None if device == "auto" else device)
    if size == 1:
        yield Mesh(resolved)
        return
    if resolved.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"torchrun started more processes than the {there} GPUs here; set --nproc-per-node {there}."
            )
        resolved = torch.device("cuda", local)
        torch.cuda.set_device(resolved)
    with _naming_lost_ranks():
        dist.init_process_group("cpu:gloo,cuda:nccl" if resolved.type == "cuda" else "gloo")
        yield _meet(resolved, size, tensor, context)
        # not after an error: it may wait for ranks that are gone, and the process is about to end
        dist.destroy_process_group()


def _meet(device: torch.device, size: int, tensor: int, context: int) -> Mesh:
    rank = dist.get_rank()
    if rank:
        logging.getLogger("oncelm").setLevel(logging.ERROR)  # the first rank warns for all
    shards = size // tensor
    mesh = init_device_mesh(device.type, (shards, tensor), mesh_dim_names=("shard", "tensor"))
    sequence = init_device_mesh(
        device.type, (shards // context, context, tensor), mesh_dim_names=("data", "context", "tensor")
    )
    data_index, context_index, tensor_index = sequence.get_coordinate() or ()
    return Mesh(
        device,
        MeshDim(rank, size),
        MeshDim(data_index, shards // context),
        MeshDim(context_index, context),
        MeshDim(tensor_index, tensor),
        mesh,
        sequence.get_group("context"),
        dist.new_group(backend="gloo", timeout=_PATIENCE),
        dist.new_group(backend="gloo", timeout=_PATIENCE),
    )


@contextlib.contextmanager
def _naming_lost_ranks() -> Iterator[None]:
    """A broken connection as one error that says what to do; gloo raises RuntimeErrors in words about sockets."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|Connection (closed|reset)", str(error)):
            raise
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"rank {os.environ.get('RANK')} lost another rank of the run ({reason}). That rank's own output says why "
            "it ended; checkpoints are whole: go on with --resume."
        ) from error
