"""The gated delta rule through flash-linear-attention's kernels, which compute in 16 bits."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from oncelm.ops.fla_trust import learns, trusted
from oncelm.ops.gated_delta import chunk as portable
from oncelm.ops.packed import by_sequence

Tensor = torch.Tensor

DTYPES = (torch.float16, torch.bfloat16)  # float32 they would round to 10 bits
MULTIPLE, LARGEST_DIM = 16, 256  # of K and V


@torch.compiler.disable
def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], g, beta [B, T, H], state [N, H, K, V] -> o, final state.

    What the kernels do not take, or do not compute rightly on this GPU, runs in chunk.py.
    """
    if initial_state is None:
        sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = g.new_zeros(sequences, *q.shape[2:], v.shape[-1])
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not _suits(q, k, v, g, beta, initial_state, packed=cu_seqlens is not None):
        return _portable(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    return _kernels(q, k, v, g, beta, scale, initial_state, cu_seqlens)


def _suits(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, packed: bool) -> bool:
    T, H, K, V = *q.shape[1:], v.shape[-1]
    sizes = all(size % MULTIPLE == 0 and size <= LARGEST_DIM for size in (K, V))
    if q.dtype not in DTYPES or not sizes or T == 0 or len(state) == 0:
        return False

    def borders() -> Tensor | None:  # made for the trial alone: a GPU is waited for
        return torch.tensor([0, 70, 70, 200], device=q.device) if packed else None

    def inputs() -> list[Tensor]:
        """Made-up q, k, v, g, beta and states of 200 tokens."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(q.device)

        made = normal(1, 200, H, K), F.normalize(normal(1, 200, H, K), dim=-1), normal(1, 200, H, V)
        gates = F.logsigmoid(normal(1, 200, H)), normal(1, 200, H).sigmoid()
        return [*(x.to(q.dtype) for x in made), *gates, normal(3 if packed else 1, H, K, V)]

    return trusted(
        "gated_delta",
        (q.device, q.dtype, H, K, V, packed),
        lambda q, k, v, g, beta, state: _kernels(q, k, v, g, beta, 1.0, state, borders()),
        lambda q, k, v, g, beta, state: _portable(q, k, v, g, beta, 1.0, state, borders()),
        inputs,
        learns(q, k, v, g, beta, state),
    )


def _kernels(q, k, v, g, beta, scale, initial_state, cu_seqlens):
    kernel = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device)
    return kernel(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )


def _portable(q, k, v, g, beta, scale, initial_state, cu_seqlens):
    return by_sequence(portable.chunk, (q, k, v, g, beta), (scale,), initial_state, cu_seqlens)
