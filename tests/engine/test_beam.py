"""Beams are those of transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from oncelm.engine import logprobs
from oncelm.engine.beam import BeamSearchParams, beam_search
from oncelm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from tests.models.small import VOCAB, make_model


class LLM:
    """Answers of one token, each of a pass over its whole prompt."""

    def __init__(self, model, eos_token_ids=()) -> None:
        self.model, self.tokenizer = model, None
        self.engine = SimpleNamespace(eos_token_ids=frozenset(eos_token_ids))

    def generate(self, prompts, params, use_tqdm):
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt
            with torch.no_grad():
                logits = self.model(torch.tensor([ids]), logits_to_keep=1).logits[0]
            table = next(logprobs.of_tokens(logits, logits.argmax(-1), [params.logprobs]))
            answer = CompletionOutput(0, token_ids=[next(iter(table))], logprobs=[table], finish_reason="length")
            outputs.append(RequestOutput("0", None, list(ids), [answer], True, RequestMetrics(0)))
        return outputs


@pytest.mark.parametrize(
    ("beam_width", "length_penalty", "early_stopping"),
    [(3, 1.0, False), (4, -0.5, True), (3, -0.5, "never"), (2, 2.5, "never"), (4, 2.5, False)],
)
def test_beams_are_those_of_transformers(beam_width, length_penalty, early_stopping) -> None:
    model, eos, reasons = make_model("window"), list(range(5, VOCAB, 7)), set()
    prompts = torch.randint(VOCAB, (2, 5)).tolist()
    params = BeamSearchParams(beam_width, 7, length_penalty, early_stopping)
    for prompt, output in zip(prompts, beam_search(LLM(model, eos), prompts, params), strict=True):
        right = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 5), max_new_tokens=7, do_sample=False,
            num_beams=beam_width, num_return_sequences=beam_width, length_penalty=length_penalty,
            early_stopping=early_stopping, eos_token_id=eos, pad_token_id=1,
        )[:, 5:]  # fmt: skip
        assert output.prompt_token_ids == prompt
        for answer, tokens in zip(output.outputs, right.tolist(), strict=True):
            count = len(answer.token_ids)
            assert (answer.token_ids, tokens[count:]) == (tokens[:count], [1] * (len(tokens) - count))
            assert answer.finish_reason == ("stop" if tokens[count - 1] in eos else "length")
            reasons.add(answer.finish_reason)
    assert "stop" in reasons


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam_width": 0}, "beam_width must be a whole number of at least 1, got 0"),
        ({"max_tokens": None}, "max_tokens must be"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number"),
        ({"early_stopping": "nver"}, "did you mean 'never'"),
    ],
)
def test_what_is_not_allowed(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        BeamSearchParams(**options)
