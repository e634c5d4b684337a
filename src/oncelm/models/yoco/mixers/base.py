"""The base class of self-decoder mixers: a module, and the class methods by which a model is built, run and measured.

`before`, `mix`, `after` and `states` are enough to train and to decode. Whatever else a subclass lacks is computed in
plain PyTorch, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.interface import LayerCache
from oncelm.cache.yoco.recurrent_state import FreshRecurrent, RecurrentState
from oncelm.models.split import Split
from oncelm.models.yoco.linear import Rounded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from oncelm.models.yoco.config import YocoConfig

Tensors = tuple[torch.Tensor, ...]


class Room(NamedTuple):
    """What a decoding cache is made for: `batch_size` sequences of up to `max_tokens` tokens (None: as many as come).

    Keys and values of all tokens are kept in `kv_dtype`, which may have 8 bits; `dtype`, a float, is for a window's.
    """

    batch_size: int
    max_tokens: int | None
    kv_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device


class MixerWork(NamedTuple):
    """What a layer's mixer costs a sequence.

    Attributes:
        numbers: of its matrices.
        mixing: FLOPs of mixing T tokens from the start.
        step: FLOPs of mixing one token behind S others.
        moved: bytes of its cache that this token reads and writes, given S and the bytes of a number, as they are
            and in keys and values of all tokens.
    """

    numbers: int
    mixing: Callable[[int], float]
    step: Callable[[int], float]
    moved: Callable[[int, float, float], float]


class Mixer(nn.Module):
    """The part of a layer that lets tokens meet: what comes before, the calls of the layer's past, what comes after.

    Shapes: B rows, T tokens (packed: B = 1), d hidden size, H heads, D head dimension.

    Attributes:
        projections: the linear layers that `before` multiplies with, in the order in which `arrange` takes what comes
            out, each with what happens to that: "rope" (rotated), "decay" (logsigmoid times `decay_scale`) or "plain".
            None: kernels know nothing of this mixer, and plain PyTorch computes it. With a gate, `after` must then
            be out_proj(swiglu(gate, rms_norm(o))), without one out_proj(o).
        float8_layers: linear layers that `set_quantization("float8")` rounds, out_proj among them; `before` must
            multiply through `project`.
        groups_heads: it can have fewer key/value heads than query heads (`num_self_key_value_heads`).
        in_cuda_graphs: nothing that a decode step does waits for the device.
        packs_in_cuda_graphs: the same of a pass over packed sequences whose borders only the device knows.
        usual_head_dim: of a model whose number of heads nobody chose.
    """

    projections: ClassVar[Mapping[str, str] | None] = None
    float8_layers: ClassVar[tuple[str, ...]] = ()
    groups_heads: ClassVar[bool] = False
    in_cuda_graphs: ClassVar[bool] = False
    packs_in_cuda_graphs: ClassVar[bool] = False
    usual_head_dim: ClassVar[int] = 64

    head_dim: int
    pairing: str
    eps: float
    decay_scale = 1.0
    out_proj: nn.Linear

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What kernels and graphs may take for granted holds for the class that says so, not for its subclasses."""
        super().__init_subclass__(**kwargs)
        for name in ("projections", "float8_layers", "in_cuda_graphs", "packs_in_cuda_graphs"):
            if name not in cls.__dict__:
                setattr(cls, name, getattr(Mixer, name))

    # -- computing ------------------------------------------------------------------------------------------------

    def before(self, h: torch.Tensor | Rounded, rotation: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
        """h [B, T, d] -> what `mix` is given, tensors [B, T, ...], and the output's gate [B, T, d], if there is one.

        Token by token: this is compiled. rotation: [B or 1, T, D/2, 2].
        """
        raise self._lacks("before(self, h, rotation)")

    def arrange(self, *projected: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
        """What `before` returns, of the outputs [B, T, ...] of `projections`."""
        raise NotImplementedError

    def mix(self, inputs: Tensors, past: Any, batch: Batch) -> torch.Tensor:
        """o [B, T, H, D]; calls the layer's past as often as it likes."""
        raise self._lacks("mix(self, inputs, past, batch)")

    def after(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """[B, T, d], to be added to the residual stream. Token by token: this is compiled."""
        raise self._lacks("after(self, o, gate)")

    def forward(self, h: torch.Tensor, rotation: torch.Tensor, past: Any, batch: Batch) -> torch.Tensor:
        """The three in turn: h [B, T, d] -> [B, T, d], to be added to the residual stream."""
        inputs, gate = self.before(h, rotation)
        o = self.mix(inputs, past, batch)
        del inputs
        return self.after(o, gate)

    def init_weights(self) -> None:
        """Draw the parameters that are the mixer's own; those of its layers are drawn as everywhere."""

    # -- what came before -----------------------------------------------------------------------------------------

    @classmethod
    def states(cls, config: YocoConfig) -> dict[str, tuple[int, ...]]:
        """The shape of each state of a sequence, by the name under which `mix` asks its past to scan with it."""
        raise cls._lacks("a classmethod states(cls, config), or new_cache and fresh_past")

    @classmethod
    def new_cache(cls, config: YocoConfig, room: Room) -> LayerCache:
        """The past of decoding."""
        return RecurrentState(room.batch_size, cls.states(config), room.device)

    @classmethod
    def fresh_past(cls, config: YocoConfig) -> Any:
        """The past of whole sequences: nothing, with gradients through everything."""
        return FreshRecurrent()

    @classmethod
    def chunk_past(cls, config: YocoConfig) -> Callable[[ProcessGroup], Any]:
        """What makes the past of a chunk of a sequence whose other chunks the other ranks of a group hold."""
        raise ValueError(f"{cls.__name__} does not know how to mix a sequence that is split over ranks.")

    # -- what its class is asked ----------------------------------------------------------------------------------

    @classmethod
    def describe(cls, config: YocoConfig) -> str:
        """In words, for `oncelm info`."""
        return f"{cls.__name__}, {config.num_self_heads} heads of {config.self_head_dim}"

    @classmethod
    def work(cls, config: YocoConfig) -> MixerWork | None:
        """What it costs; None where nobody has counted."""
        return None

    @classmethod
    def kept_numbers(cls, config: YocoConfig) -> int:
        """Numbers a token that training keeps of it for the backward pass."""
        return 12 * config.hidden_size

    @classmethod
    def tensor_plan(cls, config: YocoConfig, ranks: int) -> dict[str, Split]:
        """How its linear layers are split over ranks, by name; ValueError where they cannot be."""
        raise ValueError(f"{cls.__name__} does not know how to split its weights over ranks.")

    @classmethod
    def official_params(cls, config: YocoConfig) -> dict[str, Any]:
        """What params.json of an official folder says of it; ValueError where the official code has no such mixer."""
        raise ValueError(f"the official format knows gated_retention and sliding_window, and not {cls.__name__}.")

    @classmethod
    def _lacks(cls, what: str) -> NotImplementedError:
        return NotImplementedError(f"the mixer {cls.__name__} has to define {what}: docs/add-a-mixer.md shows how.")
