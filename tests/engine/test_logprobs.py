"""Log-probabilities are those of all logits, computed a block at a time."""

from __future__ import annotations

import math

import pytest
import torch

from oncelm.engine import logprobs
from tests.data.test_detokenize import TOKENIZERS
from tests.models.small import VOCAB, make_model


@pytest.mark.parametrize("kind", ["retention", "hybrid"])
@pytest.mark.parametrize("count", [0, 3, -1])
def test_those_of_a_prompt(kind, count, monkeypatch) -> None:
    monkeypatch.setattr(logprobs, "ROWS_AT_ONCE", 4)
    model, ids = make_model(kind), torch.randint(VOCAB, (1, 11))
    seen: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return project(hidden)

    project, inputs = model.get_output_embeddings(), []
    with torch.no_grad():
        with project.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
            right = model(ids).logits[0, :-1].log_softmax(-1)
        hidden = inputs[0].view(11, -1)[:-1]
        found = logprobs.prompt_logprobs(hidden, head, ids[0, 1:].tolist(), count)
    assert seen == [4, 4, 2]
    for token, row, table in zip(ids[0, 1:].tolist(), right, found, strict=True):
        best = row.sort(descending=True).indices[: VOCAB if count < 0 else count].tolist()
        assert list(table) == [token, *(other for other in best if other != token)]
        for other, logprob in table.items():
            assert logprob.logprob == pytest.approx(float(row[other]), abs=1e-5)
            assert logprob.rank == int((row > row[other]).sum()) + 1


def test_ranks_of_equal_ones_and_of_ones_that_cannot_come() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, float("-inf"), 0.0]])
    table = next(logprobs.tables(logprobs.measure(logits, torch.tensor([3]), [4]), [4]))
    assert {token: logprob.rank for token, logprob in table.items()} == {3: 5, 1: 1, 2: 1, 0: 3, 4: 4}
    assert table[3].logprob == float("-inf")


def test_the_text_beside_them() -> None:
    tokenizer = TOKENIZERS["bytes"]
    logits = torch.zeros(1, len(tokenizer))
    (token,) = tokenizer("a").input_ids
    table = next(logprobs.tables(logprobs.measure(logits, torch.tensor([token]), [0]), [0], tokenizer))
    assert table[token].decoded_token == "a"


def test_of_equal_logits_the_lowest_ids_come_first() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.5, 2.0, -0.0, 0.0, -1.0, 0.5, -math.inf]])
    order = [2, 4, 0, 3, 8, 5, 6, 1, 7, 9]
    for count in range(11):
        measured = logprobs.measure(logits, torch.tensor([4]), [count])
        assert measured.ids.tolist() == [order[:count]]
        torch.testing.assert_close(measured.best, logits.log_softmax(-1)[:, order[:count]])
