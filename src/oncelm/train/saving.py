"""What a checkpoint holds, written by all ranks while training goes on, read by any number of ranks.

    config.json, tokenizer.json, trainer.json          by the first rank
    model-00001-of-00001.safetensors                   weights: a lone rank's, which load as any model folder's
    shard-0000R-model-00001-of-00001.safetensors       or rank R's parts of each (torch.distributed.checkpoint)
    optimizer/                                         the optimizer's tensors, in the same way

All of it is JSON and safetensors: reading a checkpoint runs no code of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from oncelm.models.sharded import SAID_OF_A_LONE_PROCESS
from oncelm.train.checkpoint import save_checkpoint
from oncelm.train.parallel.mesh import Mesh, broadcast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = dict[str, Tensor]

MODEL, OPTIMIZER = ".", "optimizer"  # folders of a checkpoint


def tensors_to_save(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensors]:
    """The tensors themselves, this rank's parts of them, by folder and name; a tied one once."""
    named = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    weights = {name: tensor.detach() for name, tensor in named.items() if first[id(tensor)] == name}
    flat = get_optimizer_state_dict(model, optimizers, options=StateDictOptions(flatten_optimizer_state_dict=True))
    # rates, betas and decays are the config's to say: only what was learned is saved
    return {MODEL: weights, OPTIMIZER: {name: value for name, value in flat.items() if isinstance(value, Tensor)}}


def read_tensors(folder: Path, tensors: dict[str, Tensors], mesh: Mesh) -> None:
    """Fill `tensors` from a checkpoint of any number of ranks.

    Raises:
        ValueError: the checkpoint is of another model; nothing has been changed then.
    """
    readers = {part: HuggingFaceStorageReader(str(folder / part)) for part in tensors}
    for part, reader in readers.items():
        entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
        saved = {name: tuple(entry.size) for name, entry in entries.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors[part].items()}
        if different := sorted(name for name in saved | wanted if saved.get(name) != wanted.get(name)):
            name = different[0]
            raise ValueError(
                f"checkpoint {folder} does not fit the model given: {name} is {saved.get(name, 'not there')}, "
                f"the model's is {wanted.get(name, 'not there')}."
            )
    for part, reader in readers.items():
        dcp.load(tensors[part], storage_reader=reader, process_group=mesh.control, no_dist=mesh.control is None)


class Saver:
    """Writes checkpoints in a thread, one at a time; every rank has one, and all do the same at the same step.

    Args:
        root: the folder of checkpoints, on a disk that all ranks see.
        keep: how many to keep.
    """

    def __init__(self, root: Path, keep: int, mesh: Mesh) -> None:
        self.root, self.keep, self.mesh = root, keep, mesh
        # a new thread's GPU is the first one, on which every rank would then take memory
        many = mesh.device.type == "cuda" and mesh.device.index is not None
        self._on_gpu = (torch.cuda.set_device, (mesh.device,)) if many else (None, ())
        self._writing: Future[None] | None = None
        self.step: int | None = None  # of the last checkpoint that was read, written or is being written
        # on a GPU into the same pinned memory each time
        self._stager = BlockingAsyncStager(cache_staged_state_dict=mesh.device.type == "cuda")
        if mesh.control is None:  # for good: the thread that writes cannot set filters for itself alone
            warnings.filterwarnings("ignore", SAID_OF_A_LONE_PROCESS, UserWarning)

    def save(self, step: int, tensors: dict[str, Tensors], write_rest: Callable[[Path], None]) -> None:
        """Copy `tensors` to host memory, then return; the rest happens meanwhile. Waits for the save before.

        Args:
            write_rest: adds the files that the first rank writes.

        Raises:
            OSError: the save before failed.
        """
        self.wait()
        thread = ThreadPoolExecutor(1, "checkpoint", *self._on_gpu)
        self._writing = thread.submit(self._write, step, self._stager.stage(tensors), write_rest)
        thread.shutdown(wait=False)  # it ends once it has written
        self.step = step

    @property
    def failed(self) -> bool:
        """Whether the last save has ended with an error, which `wait` raises."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written; OSError if that failed."""
        if self._writing is None:
            return
        writing, step = self._writing, self.step
        self._writing = self.step = None  # where it failed, there is no checkpoint of that step
        writing.result()
        self.step = step

    def _write(self, step: int, tensors: dict[str, Tensors], write_rest: Callable[[Path], None]) -> None:
        group, error = self.mesh.saving, None
        if self.mesh.is_main:
            told = False

            def write(folder: Path) -> None:
                nonlocal told
                told = True
                broadcast(folder, group)
                self._write_tensors(folder, tensors)
                write_rest(folder)

            try:
                save_checkpoint(self.root, step, write, keep=self.keep)
            except OSError as caught:
                error = caught
            if not told:
                broadcast(None, group)
        elif folder := broadcast(None, group):
            try:
                self._write_tensors(folder, tensors)
            except OSError as caught:
                error = caught
        message = broadcast(error and str(error), group)  # the first rank's word counts: it has or has not renamed
        if message:
            raise OSError(message) from error

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensors]) -> None:
        group = self.mesh.saving
        for part, named in tensors.items():
            writer = HuggingFaceStorageWriter(str(folder / part), save_distributed=group is not None)
            try:
                dcp.save(named, storage_writer=writer, process_group=group, no_dist=group is None)
            except CheckpointException as error:  # on all ranks, whichever failed
                rank, (cause, _) = next(iter(error.failures.items()))
                kind = OSError if isinstance(cause, OSError | SafetensorError) else RuntimeError
                raise kind(f"rank {rank}: {cause}" if group is not None else str(cause)) from error
