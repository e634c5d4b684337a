"""Pasts of a fixed size for each sequence, and among them that of recurrences: a few states.

Three forms: decoding (in a CUDA graph too), the slots of an engine, training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from oncelm.cache.batch import HISTORY, Batch
from oncelm.cache.yoco.interface import Tensors
from oncelm.cache.yoco.places import Places
from oncelm.utils.errors import check_choice
from oncelm.utils.memory import checked_zeros


class Recorded(NamedTuple):
    """A forward pass: the tensors before it, and what redoes it for the first tokens of each sequence."""

    batch: Batch
    before: dict[str, torch.Tensor]
    redo: list[Callable[[Batch, Batch], None]]


class FixedSize:
    """A LayerCache whose tensors [N, ...] do not grow. To undo a pass it copies them and takes some tokens in again."""

    tensor_names: tuple[str, ...] = ()
    grows = False

    def __init__(self) -> None:
        self.recording = False
        self.history: deque[Recorded] = deque(maxlen=HISTORY)

    def record(self, on: bool) -> None:
        self.recording = on
        self.history.clear()

    def remember(self, batch: Batch, redo: Callable[[Batch, Batch], None]) -> None:
        """To be called before a pass changes anything; `redo(batch, kept)` takes in the tokens `kept` of `batch`."""
        if not self.history or self.history[-1].batch is not batch:
            before = {name: getattr(self, name).clone() for name in self.tensor_names}
            self.history.append(Recorded(batch, before, []))
        self.history[-1].redo.append(redo)

    def rewind(self, kept: Batch) -> None:
        last = self.history.pop()
        for name, tensor in last.before.items():
            getattr(self, name).copy_(tensor)
        for redo in last.redo:
            redo(last.batch, kept)

    def reserve(self, num_tokens: int) -> None:
        """Nothing: the size is fixed."""

    def select(self, index: torch.Tensor, num_tokens: int) -> None:
        for name in self.tensor_names:
            setattr(self, name, getattr(self, name)[index])

    def step_form(self) -> Any:
        return self


class RecurrentState(FixedSize):
    """States [N, ...] float32 for N sequences, by name; the `shapes` are without N."""

    def __init__(self, batch_size: int, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        super().__init__()
        self.tensor_names = tuple(shapes)
        for name, shape in shapes.items():
            if hasattr(self, name) or not name.isidentifier():
                raise ValueError(f"a state cannot be called {name!r}: choose another word.")
            what = f"a state of {batch_size:,} sequences"
            setattr(self, name, checked_zeros((batch_size, *shape), torch.float32, device, what))

    def scan(
        self,
        name: str,
        op: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        inputs: Tensors,
        batch: Batch,
        step: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As RecurrentPast.scan; the state moves past the batch's tokens. Nothing here waits for the device."""
        check_choice("state", name, self.tensor_names)
        if self.recording:
            self.remember(batch, partial(self._redo, name, op, inputs))
        state = getattr(self, name)
        if step is not None and batch.cu_seqlens is None and inputs[0].shape[1] == 1:
            return step(*inputs, state)
        o, final_state = apply(name, op, inputs, state, batch.cu_seqlens)
        state.copy_(final_state)
        return o

    def pool_form(self, places: Places) -> SlotStates:
        return SlotStates(self, places)

    def _redo(self, name: str, op: Callable, inputs: Tensors, batch: Batch, kept: Batch) -> None:
        state = getattr(self, name)
        for group, new in zip(batch.groups(), kept.groups(), strict=True):
            if new.length:
                first = (x[group.where][:, : new.length] for x in inputs)
                state[group.rows] = op(
                    *first, initial_state=state[group.rows], output_final_state=True, cu_seqlens=None
                )[1]


def apply(
    name: str, op: Callable, inputs: Tensors, state: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `op` makes of the inputs, and the states [N, ...] behind them; ValueError where those have another shape."""
    o, final_state = op(*inputs, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    if final_state is None or final_state.shape != state.shape:  # which a copy might stretch
        found = None if final_state is None else list(final_state.shape)
        raise ValueError(f"the state {name!r} is {list(state.shape)}, and what its op returned {found}.")
    return o, final_state


class SlotStates:
    """States that stand in the slots of a pool."""

    def __init__(self, held: RecurrentState, places: Places) -> None:
        self.held, self.places = held, places

    def scan(
        self, name: str, op: Callable, inputs: Tensors, batch: Batch, step: Callable[..., torch.Tensor] | None = None
    ) -> torch.Tensor:
        """As RecurrentPast.scan; the states move past the tokens that count."""
        check_choice("state", name, self.held.tensor_names)
        states, slots = getattr(self.held, name), self.places.slots
        kept = self.places.kept
        if isinstance(kept, tuple):
            return self._scan_drafts(name, op, inputs, states, batch)
        if kept is not None:
            return self._step_drafts(name, op, inputs, states, kept, step)
        if step is not None and batch.cu_seqlens is None and inputs[0].shape[1] == 1:
            if _takes(step, "slots"):
                return step(*inputs, states, slots=slots)
            op = _as_op(step)
        o, final_state = apply(name, op, inputs, states[slots], batch.cu_seqlens)
        states[slots] = final_state.to(states.dtype)
        return o

    def _scan_drafts(
        self, name: str, op: Callable, inputs: Tensors, states: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Tokens that count move the states; from there the drafts are computed, and their states dropped."""
        counted, drafts, order = self.places.parts(batch)
        outputs = []
        for part in (counted, drafts):
            own = tuple(x[:, part.tokens] for x in inputs)
            o, final_state = apply(name, op, own, states[part.slots], part.cu_seqlens)
            if part is counted:
                states[part.slots] = final_state.to(states.dtype)
            outputs.append(o)
        return torch.cat(outputs, dim=1)[:, order]

    def _step_drafts(
        self, name: str, op: Callable, inputs: Tensors, states: torch.Tensor, kept: torch.Tensor, step: Callable | None
    ) -> torch.Tensor:
        """The same for a few tokens of each sequence, of which the device knows how many count."""
        slots = self.places.slots
        if step is not None and _takes(step, "kept"):
            return step(*inputs, states, slots=slots, kept=kept)
        op = op if step is None else _as_op(step)
        state = stored = states[slots]
        outputs = []
        for t in range(inputs[0].shape[1]):
            o, final_state = apply(name, op, tuple(x[:, t : t + 1] for x in inputs), state, None)
            state = final_state.to(states.dtype)
            counts = (kept > t).view(-1, *[1] * (state.dim() - 1))
            stored = torch.where(counts, state, stored)
            outputs.append(o)
        states[slots] = stored
        return torch.cat(outputs, dim=1)


def _takes(step: Callable, argument: str) -> bool:
    """Whether a step has this argument. Asked at each call: inspect.signature would take as long as a step."""
    code = getattr(step, "__code__", None)
    return code is not None and argument in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _as_op(step: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A step, which changes a state in place, as an op, which returns another."""

    def op(*inputs: torch.Tensor, initial_state: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        state = initial_state.clone()
        return step(*inputs, state), state

    return op


class FreshRecurrent:
    """The past of a recurrence from zero states; gradients flow through all of it."""

    def scan(self, name: str, op: Callable, inputs: Tensors, batch: Batch, step: Any = None) -> torch.Tensor:
        """As RecurrentPast.scan."""
        return op(*inputs, initial_state=None, output_final_state=False, cu_seqlens=batch.cu_seqlens)[0]
