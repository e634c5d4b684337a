"""One new token a sequence as a CUDA graph: a decode step costs what its kernels cost, not what Python costs.

A step is recorded the second time it runs in succession (beam search reorders rows at every step, so recording would
not pay there) and replayed from then on, at any positions of the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from oncelm.cache.batch import Batch
from oncelm.models.plain import Wiring

WARM_UP_STEPS = 1  # steps without a graph: they compile the kernels and allocate what libraries want


class StepGraph:
    """A function of the new tokens [N, 1] of N sequences and of where they stand, as a graph from its second run on.

    Args:
        run: of the tokens and a `Batch.step`; what it gives lies at the same place until the next step. It must wait
            for nothing on the device.
        num_sequences: N.
    """

    def __init__(self, run: Callable[[torch.Tensor, Batch], torch.Tensor], num_sequences: int, device: torch.device):
        self.run = run
        self.tokens = torch.zeros(num_sequences, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)  # moved on by the step itself
        self.reached: tuple[int, ...] | None = None  # where `positions` stands
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """What `run` gives for tokens [N, 1] behind `lengths` tokens of each sequence, valid until the next step."""
        self.tokens.copy_(tokens)
        if self.reached != lengths:
            self.positions.copy_(torch.tensor(lengths)[:, None])
        self.reached = None  # unless this step ends well
        if self.graph is None and self.steps >= WARM_UP_STEPS and tokens.is_cuda:
            self._record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        self.steps, self.reached = self.steps + 1, tuple(length + 1 for length in lengths)
        return self.output

    def _record(self) -> None:
        """Recording runs nothing: what was there before, and the positions, stay as they are."""
        self.graph, _ = record(self._step, self.tokens.device)

    def _step(self) -> None:
        self.output = self.run(self.tokens, Batch.step(self.positions))
        self.positions += 1


def record(run: Callable[[], Any], device: torch.device, memory: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`run` as a CUDA graph, and what it returns, which every replay writes anew; nothing is run.

    memory: of `torch.cuda.graph_pool_handle()`, which graphs share that never need each other's results.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
    # thread_local: what other threads ask of the GPU meanwhile is no error
    with (
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"),
    ):
        result = run()
    return graph, result


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Of the model's GPU: torch's default is of whichever was current first, and would record nothing of another."""
    return torch.cuda.Stream(device)


class StepGraphs:
    """The steps of one model, each by what it changes (a cache). A copy of the model begins without any."""

    def __init__(self) -> None:
        self._wiring: Wiring | None = None
        self._steps: WeakKeyDictionary[Any, tuple[Hashable, StepGraph]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[StepGraphs], tuple[()]]:
        return StepGraphs, ()

    def stand_for(self, model: nn.Module, plain_types: Callable[[], tuple[type[nn.Module], ...]]) -> bool:
        """Whether graphs can stand for the model as it is now: modules of these types only, and no hooks.

        Where it has other modules or weights than before, all steps are forgotten.
        """
        if self._wiring is None or not self._wiring.is_unchanged:
            self._wiring = Wiring(model, plain_types())
            self._steps.clear()
        return self._wiring.is_plain

    def find(self, cache: Any, key: Hashable, make: Callable[[], StepGraph]) -> StepGraph:
        """The step of this cache; a new one where `key`, all that it was recorded of beside the model, has changed."""
        found = self._steps.get(cache)
        if found is None or found[0] != key:
            found = self._steps[cache] = key, make()
        return found[1]
