"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): a state in which a key overwrites what was stored under it.

As the layer `gated_deltanet` of flash-linear-attention, with keys and values of one dimension and an output gate.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.interface import RecurrentPast
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.yoco.linear import Rounded, linear, project
from oncelm.models.yoco.mixers.base import Mixer, MixerWork, Tensors
from oncelm.models.yoco.mixers.registry import register_mixer
from oncelm.ops import gated_delta, gated_delta_step, rms_norm, short_convolution, short_convolution_step, swiglu

if TYPE_CHECKING:
    from oncelm.models.yoco.config import YocoConfig

UNIT_EPS = 1e-6  # added to the squared length of queries and keys
DECAYS = 1e-4, 16.0  # a head's A is drawn between these,
STEPS = 1e-3, 1e-1  # and its softplus(dt_bias), log-uniformly, between these


@register_mixer("gated_delta")
class GatedDelta(Mixer):
    """Project, convolve a few tokens, overwrite the state under keys of length 1, read it, normalise, gate, project."""

    in_cuda_graphs = True
    usual_head_dim = 128

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        d, H, self.head_dim = config.hidden_size, config.num_self_heads, config.self_head_dim
        self.q_proj = linear(d, d)
        self.k_proj = linear(d, d)
        self.v_proj = linear(d, d)
        self.g_proj = linear(d, d)
        self.a_proj = linear(d, H)
        self.b_proj = linear(d, H)
        # of queries, keys and values one after the other, laid out as torch.nn.Conv1d's, which no optimizer takes for
        # a matrix
        self.conv_weight = nn.Parameter(torch.empty(3 * d, 1, config.conv_size))
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.head_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.out_proj = linear(d, d)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As flash-linear-attention, and torch's Conv1d."""
        bound = self.conv_weight.shape[-1] ** -0.5
        init.uniform_(self.conv_weight, -bound, bound)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*DECAYS).log())
        steps = torch.empty_like(self.dt_bias).uniform_(*map(math.log, STEPS)).exp()
        init.copy_(self.dt_bias, steps + (-torch.expm1(-steps)).log())  # the inverse of softplus

    def before(self, h: torch.Tensor | Rounded, rotation: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        q, k, v, gate, a, b = project(h, self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.a_proj, self.b_proj)
        # decay and strength stay float32: the log decay is summed over the whole sequence
        A_log, dt_bias, a, b = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (self.A_log, self.dt_bias, a, b)
        )
        return (torch.cat((q, k, v), dim=-1), -A_log.exp() * F.softplus(a + dt_bias), b.sigmoid()), gate

    def mix(self, inputs: Tensors, past: RecurrentPast, batch: Batch) -> torch.Tensor:
        qkv, g, beta = inputs
        weight = self.conv_weight[:, 0]

        def step(
            x: torch.Tensor, tail: torch.Tensor, slots: torch.Tensor | None = None, kept: torch.Tensor | None = None
        ) -> torch.Tensor:
            return short_convolution_step(x, weight, tail, slots=slots, kept=kept)

        qkv = past.scan("tail", partial(short_convolution, weight=weight), (qkv,), batch, step=step)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.chunk(3, dim=-1))
        return past.scan("state", gated_delta, (_unit(q), _unit(k), v, g, beta), batch, step=gated_delta_step)

    def after(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        assert gate is not None
        return project(swiglu(gate, self.head_norm(o).flatten(2)), self.out_proj)[0]

    @classmethod
    def states(cls, config: YocoConfig) -> dict[str, tuple[int, ...]]:
        return {
            "state": (config.num_self_heads, config.self_head_dim, config.self_head_dim),
            "tail": (config.conv_size - 1, 3 * config.hidden_size),
        }

    @classmethod
    def describe(cls, config: YocoConfig) -> str:
        heads = f"{config.num_self_heads} heads of {config.self_head_dim}"
        return f"gated delta rule, {heads}, convolution of {config.conv_size} tokens"

    @classmethod
    def work(cls, config: YocoConfig) -> MixerWork:
        """k S, k^T u and q S are 2 D^2 each a head and token, a tap 2 a channel; states, in float32, move twice."""
        d, D, W = config.hidden_size, config.self_head_dim, config.conv_size
        token = 6 * d * D + 2 * 3 * d * W
        return MixerWork(
            numbers=5 * d * d + 2 * d * config.num_self_heads,
            mixing=lambda T: token * T,
            step=lambda S: token,
            moved=lambda S, *element_sizes: 2 * 4 * (d * D + 3 * d * (W - 1)),
        )

    @classmethod
    def kept_numbers(cls, config: YocoConfig) -> int:
        return 16 * config.hidden_size


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(|x|^2 + UNIT_EPS) of the last dimension D: RMSNorm, which torch has a kernel for, times a factor."""
    D = x.shape[-1]
    return rms_norm(x, None, UNIT_EPS / D) * D**-0.5
