"""Scores from shared prefixes equal those of each request read by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, CohereConfig, Gemma2Config, GPT2Config, MambaConfig

from oncelm import load_tokenizer
from oncelm.eval import LanguageModel
from oncelm.eval.harness import scoring, tree
from oncelm.eval.harness.scoring import score_requests
from oncelm.eval.harness.tree import Request
from oncelm.models.session import own_cache, transformers_cache
from tests.eval.conftest import KINDS, SHAPE
from tests.models.small import make_long


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
    found = score_requests(model, model.session(), requests, counted.append)
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
        patch.setattr(scoring, "WORTH_SHARING", worth)
        patch.setattr(tree, "WORTH_SHARING", worth)
        check(language_models(kind), make_requests(seed, few_shot, documents=4))


OTHERS = {
    "positions in a table": GPT2Config(
        vocab_size=260, n_positions=69, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    ),
    "logits scaled behind the head": CohereConfig(**SHAPE, logit_scale=0.3, pad_token_id=0),
    "logits capped, some layers with windows": Gemma2Config(
        **SHAPE, head_dim=16, sliding_window=9, final_logit_softcapping=2.0
    ),
    "positions from the mask": BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=2),
    "a state in place of keys": MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models(kind) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[kind])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    asking = LanguageModel(model, load_tokenizer("bytes"), kind)
    assert asking.session().branches == kind.startswith(("positions in", "logits scaled"))
    # texts as long as the model reads, beside short ones with long continuations
    long, short, end = (np.arange(count, dtype=np.int32) % 7 for count in (67, 20, 15))
    edge = [Request(text, np.array([i, *end[:n]], np.int32)) for text, n in ((long, 1), (short, 14)) for i in range(2)]
    check(asking, make_requests(5, few_shot=20, documents=6) + edge)


@pytest.mark.parametrize("last_context_length", [6, 48])
def test_longllama(last_context_length) -> None:
    """What may move to memory is read by itself, the rest as rows."""
    model = make_long(
        vocab_size=260, max_position_embeddings=64, last_context_length=last_context_length, mem_positionals=False
    )
    asking = LanguageModel(model, load_tokenizer("bytes"), "longllama")
    requests = [r for r in make_requests(4, 5, 6) if len(r.read) < last_context_length]  # alone() reads one more
    assert requests
    check(asking, requests)
    # longer ones: the context is read first, then the continuation
    request = Request(np.arange(50, dtype=np.int32), np.arange(7, dtype=np.int32))
    cache = model.new_cache()
    with torch.no_grad():
        first = model.prefill(torch.arange(50)[None], cache)
        rest = model(torch.arange(7)[None], past_key_values=cache).logits[0, :-1]
    log_p = torch.cat((first, rest)).double().log_softmax(-1)
    ((likely, _),) = score_requests(asking, asking.session(), [request])
    assert likely == pytest.approx(float(log_p[range(7), range(7)].sum()), abs=1e-4)


@pytest.mark.parametrize("kind", ["retention", "llama"])
def test_out_of_memory_halves_the_batches(language_models, monkeypatch, kind) -> None:
    """Nothing is lost, nothing is answered twice; a single request that does not fit is an error."""
    model, requests = language_models(kind), make_requests(2, few_shot=0, documents=30)
    forward, sizes = model.model.forward, []

    def limited(ids, *inputs, **options):
        sizes.append(ids.numel())
        if ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(ids, *inputs, **options)

    limit = 1 << 20
    check(model, requests)
    whole = score_requests(model, model.session(), requests)
    monkeypatch.setattr(model.model, "forward", limited)
    limit = 300
    asking = model.session()
    assert score_requests(model, asking, requests) == [
        (pytest.approx(value, abs=1e-4), greedy) for value, greedy in whole
    ]
    assert max(sizes) > 300
    limit = 30
    with pytest.raises(torch.OutOfMemoryError):
        score_requests(model, asking, requests)


def test_rows_side_by_side_are_alike(language_models, monkeypatch) -> None:
    """Batches mix no short texts with long ones: a third of the tokens at most is padding."""
    random = np.random.default_rng(0)
    requests = [
        Request(random.integers(0, 250, count).astype(np.int32), np.zeros(1, np.int32))
        for count in random.integers(20, 400, 300)
    ]
    model, seen = language_models("llama"), 0
    forward = model.model.forward

    def spy(ids, *inputs, **options):
        nonlocal seen
        seen += ids.numel()
        return forward(ids, *inputs, **options)

    asking = model.session()
    assert asking.branches
    monkeypatch.setattr(model.model, "forward", spy)
    score_requests(model, asking, requests)
    assert seen < 1.5 * sum(len(request.read) for request in requests)


@pytest.mark.parametrize("kind", ["retention", "window", "llama", "mistral"])
def test_small_batches_and_long_texts(language_models, monkeypatch, kind) -> None:
    """Batches of a few rows, and nodes cut into chains, where memory is short."""
    requests = make_requests(3, few_shot=30, documents=5)
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(tree, "READ_AT_ONCE", 7)
    for module in (own_cache, transformers_cache):
        monkeypatch.setattr(
            module, "READ_AT_ONCE", 40
        )  # longer texts of a model that cannot read in parts go by themselves
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 260 * 3)
    check(language_models(kind), requests)


@pytest.mark.parametrize("kind", ["retention", "llama"])
def test_prefixes_are_read_once_and_only_targets_decoded(language_models, monkeypatch, kind) -> None:
    """Four choices behind one context: its tokens go in once, and logits exist for the targets alone."""
    model = language_models(kind)
    asking = model.session()
    assert asking.branches
    context = np.arange(50, dtype=np.int32)
    requests = [Request(context, np.array([choice, 7, 8], np.int32)) for choice in range(4)]
    seen: list[tuple[int, int]] = []
    forward = model.model.forward

    def spy(ids, **inputs):
        output = forward(ids, **inputs)
        seen.append((ids.numel(), output.logits.shape[0]))
        return output

    monkeypatch.setattr(model.model, "forward", spy)
    score_requests(model, asking, requests)
    assert seen == [(50, 1), (4 * 2, 4 * 2)]


def test_many_beginnings_of_one_text_make_a_batch(language_models) -> None:
    """More than Python nests calls: each request's text begins the next one's."""
    text = np.random.default_rng(0).integers(0, 250, 2400).astype(np.int32)
    requests = [Request(text[:end], text[end : end + 1]) for end in range(1200, 2400)]
    model = language_models("llama")
    whole = torch.from_numpy(text).long()[None]
    with torch.no_grad():
        log_p = model.model(whole).logits[0].double().log_softmax(-1)
    found = score_requests(model, model.session(), requests)
    expected = [float(log_p[end - 1, text[end]]) for end in range(1200, 2400)]
    assert [likely for likely, _ in found] == pytest.approx(expected, abs=1e-4)
