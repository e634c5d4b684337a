"""Gated retention (YOCO, arXiv 2405.05254, section 3.1): a state of fixed size that decays as each token says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.interface import RecurrentPast
from oncelm.models.split import COLUMNS, ROWS, Split
from oncelm.models.yoco.linear import Rounded, linear, project
from oncelm.models.yoco.mixers.base import Mixer, MixerWork, Tensors
from oncelm.models.yoco.mixers.registry import register_mixer
from oncelm.ops import apply_rope, gated_retention, gated_retention_step, rms_norm, swiglu
from oncelm.ops.context_parallel import state_before

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from oncelm.models.yoco.config import YocoConfig


@register_mixer("gated_retention")
class GatedRetention(Mixer):
    """Multi-head gated retention: rotate, retain, normalise each head, gate, project."""

    projections = {"q_proj": "rope", "k_proj": "rope", "v_proj": "plain", "g_proj": "plain", "gt_proj": "decay"}  # noqa: RUF012
    float8_layers = ("q_proj", "k_proj", "v_proj", "g_proj", "out_proj")
    in_cuda_graphs = True
    packs_in_cuda_graphs = True
    usual_head_dim = 256

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        d, self.head_dim = config.hidden_size, config.self_head_dim
        self.pairing, self.eps = config.rope_pairing, config.rms_norm_eps
        self.decay_scale = 1 / config.gate_logit_normalizer
        self.gate_logit_normalizer = config.gate_logit_normalizer
        self.q_proj = linear(d, d, xavier_gain=2**-2.5)
        self.k_proj = linear(d, d, xavier_gain=2**-2.5)
        self.v_proj = linear(d, d, xavier_gain=2**-2.5)
        self.g_proj = linear(d, d, xavier_gain=2**-2.5)
        self.gt_proj = linear(d, config.num_self_heads, xavier_gain=2**-2.5)
        self.out_proj = linear(d, d, xavier_gain=2**-1)

    def before(self, h: torch.Tensor | Rounded, rotation: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        *qkv, gate, decay = project(h, self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gt_proj)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv)
        # the log decay stays float32: it is summed over the whole sequence
        g = F.logsigmoid(decay.float()) / self.gate_logit_normalizer
        return (apply_rope(q, rotation, self.pairing), apply_rope(k, rotation, self.pairing), v, g), gate

    def arrange(self, *projected: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        *qkv, gate, g = projected
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv)
        return (q, k, v, g), gate

    def mix(self, inputs: Tensors, past: RecurrentPast, batch: Batch) -> torch.Tensor:
        return past.scan("state", gated_retention, inputs, batch, step=gated_retention_step)

    def after(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        assert gate is not None
        return project(swiglu(gate, rms_norm(o, None, self.eps).flatten(2)), self.out_proj)[0]

    @classmethod
    def states(cls, config: YocoConfig) -> dict[str, tuple[int, ...]]:
        return {"state": (config.num_self_heads, config.self_head_dim, config.self_head_dim)}

    @classmethod
    def chunk_past(cls, config: YocoConfig) -> type[ChunkRetention]:
        return ChunkRetention

    @classmethod
    def describe(cls, config: YocoConfig) -> str:
        return f"gated retention, {config.num_self_heads} heads of {config.self_head_dim}"

    @classmethod
    def work(cls, config: YocoConfig) -> MixerWork:
        """k^T v and q S are 2 D^2 each a head and token; the state, in float32, is read and written."""
        d, D = config.hidden_size, config.self_head_dim
        return MixerWork(
            numbers=5 * d * d + d * config.num_self_heads,
            mixing=lambda T: 4 * d * D * T,
            step=lambda S: 4 * d * D,
            moved=lambda S, *element_sizes: 2 * 4 * d * D,
        )

    @classmethod
    def tensor_plan(cls, config: YocoConfig, ranks: int) -> dict[str, Split]:
        return {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj", "gt_proj"), ROWS), "out_proj": COLUMNS}

    @classmethod
    def official_params(cls, config: YocoConfig) -> dict[str, Any]:
        return {}


class ChunkRetention:
    """Gated retention from the state that the chunks before leave: a state from each rank, once a layer."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def scan(self, name: str, op: Any, inputs: Tensors, batch: Batch, step: Any = None) -> torch.Tensor:
        """Outputs [B, T, H, V]."""
        _, k, v, g = inputs
        last = list(batch.groups())[-1]
        update, decay = _state_from_zero(*(x[last.where] for x in (k, v, g)))
        if batch.cu_seqlens is not None and (batch.num_sequences > 1 or not batch.starts[0]):
            decay = decay * 0.0  # the last sequence began here: nothing from before it goes on
        start = state_before(update, decay, self.group)
        if batch.cu_seqlens is not None:  # only the first sequence may have begun earlier
            first = start if batch.starts[0] else start * 0.0
            start = torch.cat((first, start.new_zeros(batch.num_sequences - 1, *start.shape[1:])))
        return gated_retention(*inputs, initial_state=start, cu_seqlens=batch.cu_seqlens)[0]


def _state_from_zero(k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state [N, H, K, V] that gated retention, started from zero, ends with, and its decay [N, H] of one before.

    One matrix product instead of a pass over the chunk: no outputs are needed. float32 or wider.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    # what a state loses from token t to the chunk's end, summed from the end: as a difference of two sums from the
    # beginning, both large in a long chunk, the few tokens that still count would lose most of their digits
    lost = g.to(wide).flip(1).cumsum(1).flip(1)  # over t, t + 1, ...
    weights = F.pad(lost[:, 1:], (0, 0, 0, 1)).exp() * k.shape[-1] ** -0.5
    with torch.autocast(k.device.type, enabled=False):
        update = torch.einsum("bthk,bthv->bhkv", k.to(wide) * weights[..., None], v.to(wide))
    return update, lost[:, 0].exp()
