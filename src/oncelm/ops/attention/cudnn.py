"""Window attention on a GPU through cuDNN, whose windows torch's SDPA does not offer (package nvidia-cudnn-frontend).

On Hopper it is about twice as fast as torch's FlashAttention, forward and backward (docs/performance.md). cuDNN plans
each new shape for 60 ms or more: only lengths that come back, multiples of 256 as in training and in full chunks of a
prompt, are worth it. The calls are operators that torch.compile takes whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import cudnn
import torch

from oncelm.ops.attention import varlen

Tensor = torch.Tensor

LENGTHS = 256  # queries are a multiple of this
LARGEST_DIM = 128
COMPUTED = (torch.float16, torch.bfloat16)
DTYPES = {
    torch.float16: cudnn.data_type.HALF,
    torch.bfloat16: cudnn.data_type.BFLOAT16,
    torch.float32: cudnn.data_type.FLOAT,
}


def window(q, k, v, window_size, scale, borders=None):
    """q [B, T, H, D]; k, v [B, S, H_kv, D]. What cuDNN is not asked for goes to varlen.py."""
    q, k, v = varlen.autocast(q, k, v)
    if borders is not None or not _fits(q, k, v, window_size):
        return varlen.window(q, k, v, window_size, scale, borders)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return window_op(q, k, v, window_size, scale)[0]


def _fits(q, k, v, window_size):
    T, S, D = q.shape[1], k.shape[1], q.shape[3]
    if T == 0 or T % LENGTHS or window_size >= S or D % 8 or D > LARGEST_DIM:
        return False
    # its backward pass visits every key before a query, unless queries and keys start together
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.dtype == k.dtype and q.dtype in COMPUTED and (S == T or not learning)


@torch.library.custom_op("oncelm::window_attention", mutates_args=())
def window_op(q: Tensor, k: Tensor, v: Tensor, window_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, D], and the log of the sums of the softmax [B, H, T, 1] in float32."""
    o, sums = _outputs(q)
    tensors = (q, k, v, o, sums)
    _execute(_forward_plan(tuple(_layout(x) for x in tensors), window_size, scale), tensors)
    return o, sums


@torch.library.custom_op("oncelm::window_attention_backward", mutates_args=())
def window_backward_op(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, d_o: Tensor, window_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v."""
    dq, dk, dv = _gradients(q, k, v)
    tensors = (q, k, v, o, sums, d_o, dq, dk, dv)
    _execute(_backward_plan(tuple(_layout(x) for x in tensors), window_size, scale), tensors)
    return dq, dk, dv


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    sums = q.new_empty(B, H, T, 1, dtype=torch.float32).transpose(1, 2)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), sums


def _gradients(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    return dq, dk, dv


@window_op.register_fake
def _(q, k, v, window_size, scale):
    return _outputs(q)


@window_backward_op.register_fake
def _(q, k, v, o, sums, d_o, window_size, scale):
    return _gradients(q, k, v)


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
    """A cuDNN graph ready to run, its tensors in the order of the operator's, and the room it works in."""

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


def _execute(plan: Plan, tensors: tuple[Tensor, ...]) -> None:
    device = tensors[0].device
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
    handle = _handle(device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    plan.graph.execute(dict(zip(plan.tensors, tensors, strict=True)), workspace, handle=handle)


def _graph(layout: Layout) -> Any:
    device, dtype = layout[:2]
    return cudnn.pygraph(
        handle=_handle(device),
        io_data_type=DTYPES[dtype],
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )


def _input(graph: Any, layout: Layout) -> Any:
    _, dtype, sizes, strides = layout
    return graph.tensor(dim=list(sizes), stride=list(strides), data_type=DTYPES[dtype])


def _output(tensor: Any, layout: Layout) -> None:
    _, dtype, sizes, strides = layout
    tensor.set_output(True).set_data_type(DTYPES[dtype]).set_dim(list(sizes)).set_stride(list(strides))


def _built(graph: Any, tensors: tuple[Any, ...]) -> Plan:
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return Plan(graph, tensors, graph.get_workspace_size())


@lru_cache(maxsize=256)
def _forward_plan(layouts: tuple[Layout, ...], window_size: int, scale: float) -> Plan:
    """Of q, k, v, o, sums; queries stand at the end of the keys."""
    graph = _graph(layouts[0])
    q, k, v = (_input(graph, layout) for layout in layouts[:3])
    band = {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_left_bound": window_size}
    o, sums = graph.sdpa(q=q, k=k, v=v, attn_scale=scale, generate_stats=True, diagonal_band_right_bound=0, **band)
    for tensor, layout in zip((o, sums), layouts[3:], strict=True):
        _output(tensor, layout)
    return _built(graph, (q, k, v, o, sums))


@lru_cache(maxsize=256)
def _backward_plan(layouts: tuple[Layout, ...], window_size: int, scale: float) -> Plan:
    """Of q, k, v, o, sums, d_o, dq, dk, dv; as many queries as keys."""
    graph = _graph(layouts[0])
    q, k, v, o, sums, d_o = inputs = [_input(graph, layout) for layout in layouts[:6]]
    band = {"diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_left_bound": window_size}
    gradients = graph.sdpa_backward(
        q=q, k=k, v=v, o=o, dO=d_o, stats=sums, attn_scale=scale, diagonal_band_right_bound=0, **band
    )
    for tensor, layout in zip(gradients, layouts[6:], strict=True):
        _output(tensor, layout)
    return _built(graph, (*inputs, *gradients))
