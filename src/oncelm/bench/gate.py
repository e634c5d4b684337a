"""No figure without correctness: a subject that computes something else than its own full forward is not measured."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from oncelm.bench.subjects import Subject

PROMPT, CHUNK, STEPS = 45, 19, 4  # tokens of the prompt, of a chunk of it (the last one shorter), and decoded ones

# allowed norm of the difference, relative to the norm: some hundred roundings
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class GateError(RuntimeError):
    """A subject's fast paths do not give what its full forward gives."""


@torch.no_grad()
def check(subject: Subject, dtype: torch.dtype) -> dict[str, float]:
    """Compare prefill in chunks, decoding and the loss with the full forward, on a short random text.

    Args:
        dtype: of the computation; sets the tolerance.

    Returns:
        The relative error of "prefill", "decode" and "loss".

    Raises:
        GateError: an error above the tolerance, or NaN.
    """
    model = subject.model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (2, PROMPT + STEPS), generator=generator).to(model.device)
    full = model(ids, use_cache=False).logits.float()
    last, cache = subject.prefill(ids[:, :PROMPT], room=STEPS, chunk_size=CHUNK)
    decoded = [subject.step(ids[:, i : i + 1], cache) for i in range(PROMPT, PROMPT + STEPS)]
    loss = model(ids, labels=ids, use_cache=False).loss
    errors = {
        "prefill": _error(last, full[:, PROMPT - 1]),
        "decode": _error(torch.stack(decoded, dim=1), full[:, PROMPT:]),
        "loss": _error(loss, F.cross_entropy(full[:, :-1].flatten(0, 1), ids[:, 1:].flatten())),
    }
    for what, error in errors.items():
        if not error <= TOLERANCES[dtype]:
            raise GateError(
                f"{subject.name}'s {what} differs from its full forward by {error:.2g} (relative; allowed "
                f"{TOLERANCES[dtype]:.0e} in {str(dtype).removeprefix('torch.')}): nothing is measured."
            )
    return errors


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()
