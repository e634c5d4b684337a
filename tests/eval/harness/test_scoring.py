"""Scores from shared prefixes equal those of each request read by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.eval.harness import scoring, tree
from oncelm.eval.harness.rows import new_rows
from oncelm.eval.harness.scoring import score_requests
from oncelm.eval.harness.tree import Request
from tests.eval.conftest import KINDS


def alone(model, request: Request) -> tuple[float, bool]:
    """The answer from one plain forward pass."""
    ids = torch.from_numpy(np.concatenate((request.context, request.continuation))).long()[None]
    with torch.no_grad():
        log_p = model.model(ids).logits[0, len(request.context) - 1 : -1].double().log_softmax(-1)
    wanted = ids[0, len(request.context) :]
    return float(log_p.gather(1, wanted[:, None]).sum()), bool((log_p.argmax(-1) == wanted).all())


def make_requests(seed: int, few_shot: int, documents: int) -> list[Request]:
    """Documents behind the same examples, each with choices, some of them alike or parts of others."""
    random = np.random.default_rng(seed)
    draw = lambda count: random.integers(0, 6, count).astype(np.int32)  # noqa: E731
    examples, requests = draw(few_shot), []
    for _ in range(documents):
        context = np.concatenate((examples, draw(random.integers(1, 40))))
        for _ in range(random.integers(1, 5)):
            requests.append(
                Request(
                    context[random.integers(0, 2) :] if len(context) > 1 else context, draw(1 + random.integers(0, 6))
                )
            )
    requests += [requests[0], Request(requests[0].context[:1], requests[0].continuation)]
    return [requests[i] for i in random.permutation(len(requests))]


def check(model, requests: list[Request]) -> None:
    counted: list[int] = []
    found = score_requests(new_rows(model), requests, counted.append)
    assert sum(counted) == len(requests)
    for request, (likely, greedy) in zip(requests, found, strict=True):
        expected, expected_greedy = alone(model, request)
        assert likely == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), few_shot=st.sampled_from([0, 5, 40]), worth=st.sampled_from([1, 16]))
def test_equals_one_by_one(language_models, kind, seed, few_shot, worth) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "WORTH_A_LEVEL", worth)
        patch.setattr(tree, "WORTH_A_LEVEL", worth)
        check(language_models(kind), make_requests(seed, few_shot, documents=4))


@pytest.mark.parametrize("kind", ["retention", "window"])
def test_small_batches_and_long_texts(language_models, monkeypatch, kind) -> None:
    """Batches of a few rows, and nodes cut into chains, where memory is short."""
    requests = make_requests(3, few_shot=30, documents=5)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(tree, "READ_AT_ONCE", 7)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 260 * 3)
    check(language_models(kind), requests)


def test_prefixes_are_read_once_and_only_targets_decoded(language_models, monkeypatch) -> None:
    """Four choices behind one context: its tokens go in once, and logits exist for the targets alone."""
    model = language_models("retention")
    context = np.arange(50, dtype=np.int32)
    requests = [Request(context, np.array([choice, 7, 8], np.int32)) for choice in range(4)]
    seen: list[tuple[int, int]] = []
    forward = model.model.forward

    def spy(ids, **inputs):
        output = forward(ids, **inputs)
        seen.append((ids.numel(), output.logits.shape[0]))
        return output

    monkeypatch.setattr(model.model, "forward", spy)
    score_requests(new_rows(model), requests)
    assert seen == [(50, 1), (4 * 2, 4 * 2)]
