"""No figure without correctness: a target that computes something else than its own full forward is not measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from oncelm.bench.targets import Target

# tokens of the prompt, of a chunk of it (the last one shorter; enough for compiled layers), and decoded ones
PROMPT, CHUNK, STEPS = 140, 75, 4

# allowed norm of the difference, relative to the norm: some hundred roundings; for 8 bits, those of keys and values
TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
    torch.float8_e4m3fn: 6e-2,
    torch.int8: 6e-2,
}
FLOAT8_TOLERANCE = 0.1  # of products in float8; seen with random weights: 0.034


class GateError(RuntimeError):
    """A target's fast paths do not give what its full forward gives."""


@torch.no_grad()
def check(target: Target, dtype: torch.dtype, batch_size: int = 2, training: bool = False) -> dict[str, float]:
    """Compare prefill in chunks, decoding and the loss with the full forward, on a short random text.

    The full forward and the loss are plain PyTorch, whatever is compiled.

    Args:
        dtype: of the computation; it and the dtype of the cache set the tolerance.
        batch_size: of what will be measured: one compiled form serves one sequence, another one several.
        training: leave prefill and decoding plain too; `check_step` is the check of compiled training.

    Returns:
        The relative error of "prefill", "decode" and "loss".

    Raises:
        GateError: an error above the tolerance, or NaN.
    """
    model = target.model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (batch_size, PROMPT + STEPS), generator=generator).to(model.device)
    with torch.compiler.set_stance("force_eager"):
        full = target.full(ids).float()
        loss = target.loss(ids)
    with torch.compiler.set_stance("force_eager" if training else "default"):
        last, session = target.prefill(ids[:, :PROMPT], room=STEPS, chunk_size=CHUNK)
        decoded = [session.step(ids[:, i : i + 1]) for i in range(PROMPT, PROMPT + STEPS)]
    errors = {
        "prefill": _error(last, full[:, PROMPT - 1]),
        "decode": _error(torch.stack(decoded, dim=1), full[:, PROMPT:]),
        "loss": _error(loss, F.cross_entropy(full[:, :-1].flatten(0, 1), ids[:, 1:].flatten())),
    }
    float8 = target.settings.get("quantization") == "float8"
    allowed = max(FLOAT8_TOLERANCE if float8 else TOLERANCES[dtype], TOLERANCES[target.kv_dtype])
    _refuse(target, errors, allowed, "float8" if float8 else dtype)
    return errors


def check_step(target: Target, backward: Callable[[], torch.Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Compare the loss and all gradients of a compiled training step with those of plain PyTorch.

    Args:
        backward: computes the loss, which it returns, and the gradients of the target's model.
        dtype: of the computation; sets the tolerance.

    Returns:
        The relative error of "loss_error" and "gradient_error".

    Raises:
        GateError: an error above the tolerance, or NaN.
    """
    with torch.compiler.set_stance("force_eager"):
        expected_loss = backward()
    parameters = [parameter for parameter in target.model.parameters() if parameter.grad is not None]
    expected = [parameter.grad for parameter in parameters]
    target.model.zero_grad(set_to_none=True)
    loss = backward()
    difference = sum((p.grad - e).pow(2).sum() for p, e in zip(parameters, expected, strict=True))
    whole = sum(e.pow(2).sum() for e in expected)
    errors = {"loss_error": _error(loss, expected_loss), "gradient_error": (difference / whole).sqrt().item()}
    target.model.zero_grad(set_to_none=True)
    _refuse(target, errors, TOLERANCES[dtype], dtype)
    return errors


def _refuse(target: Target, errors: dict[str, float], allowed: float, precision: object) -> None:
    for what, error in errors.items():
        if not error <= allowed:
            raise GateError(
                f"{target.name}'s {what.removesuffix('_error')} differs from plain PyTorch's by {error:.2g} "
                f"(relative; allowed {allowed:.0e} in {str(precision).removeprefix('torch.')}): nothing is measured."
            )


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()
