"""Window attention on a GPU through cuDNN, whose windows torch's SDPA does not offer (package nvidia-cudnn-frontend).

On Hopper its forward pass is twice as fast as that of torch's FlashAttention. Its backward pass visits every key before
a query where the window is laid against the end of the keys, so the backward pass is FlashAttention's
(docs/performance.md). cuDNN plans each new shape for 60 ms or more: only lengths that come back, multiples of 256 as in
training and in full chunks of a prompt, are worth it. Both passes are operators that torch.compile takes whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import cudnn
import torch

from oncelm.ops import gpu
from oncelm.ops.attention import varlen

Tensor = torch.Tensor

LENGTHS = 256  # queries are a multiple of this
LARGEST_DIM = 128
DTYPES = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}


def window(q, k, v, window_size, scale, borders=None):
    """q [B, T, H, D]; k, v [B, S, H_kv, D]. What cuDNN is not asked for goes to varlen.py."""
    q, k, v = varlen.autocast(q, k, v)
    T, D = q.shape[1], q.shape[3]
    fits = q.dtype == k.dtype and q.dtype in DTYPES and D % 8 == 0 and D <= LARGEST_DIM
    if borders is not None or not fits or T == 0 or T % LENGTHS or window_size >= k.shape[1]:
        return varlen.window(q, k, v, window_size, scale, borders)
    scale = D**-0.5 if scale is None else scale
    return window_op(q, k, v, window_size, scale)[0]


@torch.library.custom_op("oncelm::window_attention", mutates_args=())
def window_op(q: Tensor, k: Tensor, v: Tensor, window_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, D], and the log of the sums of the softmax [B, H, T] in float32."""
    o, sums = _outputs(q)
    plan = _plan(*(_layout(x) for x in (q, k, v, o)), window_size, scale)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=q.device)
    handle = _handle(q.device)
    with gpu.on(q):
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
        plan.graph.execute(dict(zip(plan.tensors, (q, k, v, o, sums), strict=True)), workspace, handle=handle)
    return o, sums


@torch.library.custom_op("oncelm::window_attention_backward", mutates_args=())
def window_backward_op(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, d_o: Tensor, window_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        d_o, q, k, v, o, sums, None, None, q.shape[1], k.shape[1], 0.0, False, no_dropout, no_dropout[:0],
        scale=scale, window_size_left=window_size - 1, window_size_right=0,
    )  # fmt: skip
    return dq, dk, dv


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((B, H, T), dtype=torch.float32)


@window_op.register_fake
def _(q, k, v, window_size, scale):
    return _outputs(q)


@window_backward_op.register_fake
def _(q, k, v, o, sums, d_o, window_size, scale):
    return tuple(torch.empty_like(x) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ctx.window_size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, d_o, _):
    gradients = window_backward_op(*ctx.saved_tensors, d_o.contiguous(), ctx.window_size, ctx.scale)
    return *gradients, None, None


window_op.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------------- plans

Layout = tuple[torch.device, torch.dtype, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """A cuDNN graph ready to run, its tensors q, k, v, o and sums, and the room that it works in."""

    graph: Any
    tensors: tuple[Any, ...]
    workspace_bytes: int


def _layout(x: Tensor) -> Layout:
    """Device, dtype, sizes and strides of x [B, T, H, D], in cuDNN's order [B, H, T, D]."""
    x = x.transpose(1, 2)
    return x.device, x.dtype, tuple(x.shape), x.stride()


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return cudnn.create_handle()


@lru_cache(maxsize=256)
def _plan(q: Layout, k: Layout, v: Layout, o: Layout, window_size: int, scale: float) -> Plan:
    device, dtype, (B, H, T, _), _ = q
    graph = cudnn.pygraph(
        handle=_handle(device),
        io_data_type=DTYPES[dtype],
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    inputs = [
        graph.tensor(dim=list(sizes), stride=list(strides), data_type=DTYPES[dtype])
        for _, _, sizes, strides in (q, k, v)
    ]
    out, sums = graph.sdpa(
        **dict(zip("qkv", inputs, strict=True)),
        attn_scale=scale,
        generate_stats=True,
        diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT,  # queries stand at the end of the keys
        diagonal_band_left_bound=window_size,
        diagonal_band_right_bound=0,
    )
    out.set_output(True).set_dim(list(o[2])).set_stride(list(o[3]))
    sums.set_output(True).set_data_type(cudnn.data_type.FLOAT).set_dim([B, H, T, 1]).set_stride([H * T, T, 1, 1])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return Plan(graph, (*inputs, out, sums), graph.get_workspace_size())
