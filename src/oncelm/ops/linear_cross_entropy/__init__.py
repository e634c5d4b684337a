"""The loss of a language model's last layer without the [tokens, vocabulary] matrix of logits.

Rows are taken a chunk at a time. A chunk's logits are made, replaced by their own gradient, multiplied into the
gradients of hidden states and weight, and overwritten by the next chunk: three matrix products in all, none of them
repeated in the backward pass, which only scales what is there. Memory is one chunk of logits plus the gradients.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from oncelm.ops.dispatch import implementation

__all__ = ["linear_cross_entropy"]

# Logits alive at a time. A cache holds a CPU's; on a GPU each chunk also costs a pass over the weight's gradient.
CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
ROWS_MULTIPLE = 256  # of a chunk, where there are as many: the tiles of a GPU's matrix product then fit


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Sum over rows of the cross-entropy of `hidden @ weight.T`.

    Products are in the autocast dtype, or else in the wider of the two dtypes; softmax, loss and the sum that is the
    weight's gradient are in float32 or wider. Gradients are computed with the loss, where one is wanted, so that a
    second backward pass through the same result (`retain_graph=True`) raises.

    Args:
        hidden: [M, d].
        weight: [V, d].
        targets: [M] integers in 0..V-1; drop ignored rows before the call. Others are refused on a CPU; elsewhere,
            where looking at them would wait for the device, they make the loss NaN.
        backend: "auto", "triton" or "naive".

    Returns:
        The summed loss, a float32 scalar (float64 for float64 inputs); divide by M for the mean.
    """
    check_shapes(hidden, weight, targets)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    loss, _, _ = linear_cross_entropy_op(hidden, weight, targets, dtype, *needed, backend)
    return loss


def check_shapes(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """ValueError unless they are [M, d], [V, d] and [M] integers."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [M, d] and weight [V, d] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}.")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets must be [M] = [{hidden.shape[0]}] integers, got {targets.dtype} {tuple(targets.shape)}."
        )


def check_range(targets: torch.Tensor, vocabulary: int) -> None:
    """ValueError for a target outside 0..vocabulary - 1 on a CPU, where to look does not wait for a device."""
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(
                f"targets must lie in 0..{vocabulary - 1}, the vocabulary, got {wrong}; drop ignored rows (-100) first."
            )


@torch.library.custom_op("oncelm::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed loss, and its gradients [M, d] and [V, d]; empty where not needed."""
    to_gradient = implementation("linear_cross_entropy", backend, hidden.device)
    check_range(targets, weight.shape[0])
    M, V = hidden.shape[0], weight.shape[0]
    loss, grad_hidden, grad_weight = _outputs(hidden, weight, dtype, needs_hidden, needs_weight)
    losses = loss.new_empty(M)
    rows = chunk_rows(M, V, dtype, hidden.device)
    buffer = hidden.new_empty(rows, V, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(dtype)
        for start in range(0, M, rows):
            chunk = slice(start, start + rows)
            x = hidden[chunk].to(dtype)
            logits = torch.mm(x, weight.T, out=buffer[: len(x)])
            to_gradient(logits, targets[chunk], losses[chunk], needs_hidden or needs_weight)
            if needs_hidden:
                grad_hidden[chunk] = logits @ weight
            if needs_weight:
                _add_product(grad_weight, logits.T, x)
    return losses.sum(), grad_hidden, grad_weight


def chunk_rows(M: int, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of logits alive at a time."""
    rows = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (V * dtype.itemsize))
    if rows > ROWS_MULTIPLE:
        rows -= rows % ROWS_MULTIPLE
    return min(rows, max(M, 1))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, where `total` may be wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _outputs(
    hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, needs_hidden: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients, to be filled."""
    wide = torch.promote_types(dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else weight.new_empty(0)
    return hidden.new_empty((), dtype=wide), grad_hidden, grad_weight


@linear_cross_entropy_op.register_fake
def _shapes(hidden, weight, targets, dtype, needs_hidden, needs_weight, backend):
    return _outputs(hidden, weight, dtype, needs_hidden, needs_weight)


def _save(ctx, inputs, output):
    _, weight, _, _, *needed, _ = inputs
    ctx.needed, ctx.weight_dtype = needed, weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _scale(ctx, grad_loss, *_):
    # in place: the weight's gradient can be a gigabyte. autograd sees the change and refuses a second pass
    grad_hidden, grad_weight = (
        gradient.mul_(grad_loss) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    )
    return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.weight_dtype), *(None,) * 5


linear_cross_entropy_op.register_autograd(_scale, setup_context=_save)


@register_flop_formula(torch.ops.oncelm.linear_cross_entropy)
def _flops(hidden, weight, targets, dtype, needs_hidden, needs_weight, *_, **__):
    """For torch's FlopCounterMode, which does not look into an operator; hidden and weight are shapes."""
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + needs_hidden + needs_weight)
