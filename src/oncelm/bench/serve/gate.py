"""No figure without correctness: an engine whose answers are not its model's is not measured."""

from __future__ import annotations

from typing import Any

import torch

from oncelm.bench.gate import FLOAT8_TOLERANCE, TOLERANCES, GateError
from oncelm.bench.serve.in_process import Engine
from oncelm.engine.outputs import RequestOutput
from oncelm.engine.params import SamplingParams

PROMPTS = (140, 75, 3)  # tokens, at once
STEPS = 8  # tokens of each answer


@torch.no_grad()
def check_engine(
    engine: Engine,
    model: Any,
    kv_dtype: torch.dtype | None = None,
    longest: int = PROMPTS[0] + STEPS,
) -> dict[str, float]:
    """Compare greedy answers to a few short random prompts with a full forward pass over prompt and answer.

    Args:
        engine: runs `model`.
        kv_dtype: of its keys and values; None: the model's.
        longest: tokens of a prompt and its answer, where it takes only so many.

    Returns:
        Root mean squares over all tokens of the answers, in standard deviations of the logits at that place:
        "logprobs", the difference between both's log-probabilities; "greedy", how far the logit of the token that was
        chosen is below the largest.

    Raises:
        GateError: one is above what rounding explains, or NaN.
    """
    generator = torch.Generator().manual_seed(1)
    vocab_size = model.config.vocab_size
    lengths = {max(1, min(n, longest - STEPS)) for n in PROMPTS}
    asked = {f"gate {n}": torch.randint(vocab_size, (n,), generator=generator).tolist() for n in sorted(lengths)}
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True, logprobs=1, detokenize=False)
    for name, prompt in asked.items():
        engine.add_request(name, prompt, params)
    answers: dict[str, RequestOutput] = {}
    while len(answers) < len(asked):
        answers |= {output.request_id: output for output in engine.step() if output.finished}
    logprobs, greedy = [], []
    for name, prompt in asked.items():
        answer = answers[name].outputs[0]
        if answer.error is not None:
            raise GateError(f"the engine failed on a prompt of {len(prompt)} tokens: {answer.error}")
        assert answer.logprobs is not None, answer
        told = [place[token].logprob for place, token in zip(answer.logprobs, answer.token_ids, strict=True) if place]
        logits = _full(model, [*prompt, *answer.token_ids[:-1]])[-STEPS:]  # [STEPS, V]
        chosen = torch.tensor(answer.token_ids, device=logits.device)[:, None]
        expected = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        logprobs.append((torch.tensor(told, device=logits.device) - expected) / logits.std(-1))
        greedy.append((logits.amax(-1) - logits.gather(1, chosen)[:, 0]) / logits.std(-1))
    errors = {
        name: torch.cat(found).square().mean().sqrt().item()
        for name, found in (("logprobs", logprobs), ("greedy", greedy))
    }
    allowed = max(TOLERANCES[model.dtype], TOLERANCES[kv_dtype or model.dtype])
    allowed = max(allowed, FLOAT8_TOLERANCE) if getattr(model, "quantization", None) == "float8" else allowed
    for name, error in errors.items():
        if not error <= allowed:
            raise GateError(
                f"the engine's answers differ from the model's own forward pass by {error:.2g} ({name}, in standard "
                f"deviations of the logits; allowed {allowed:.0e}): nothing is measured."
            )
    return errors


def _full(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] float32 of one pass over all of `ids`, in plain PyTorch."""
    with torch.compiler.set_stance("force_eager"):
        return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
