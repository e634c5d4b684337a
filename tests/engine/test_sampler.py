"""Tokens are chosen as their parameters say, whatever is beside them."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from oncelm.engine.noise import draw_keys, gumbel
from oncelm.engine.params import SamplingParams
from oncelm.engine.places import Memo, Sampled, SamplingRow
from oncelm.engine.sampler import Sampler
from tests.data.test_detokenize import TOKENIZERS

VOCAB = 40
CPU = torch.device("cpu")


def row(seed: int = 0, prompt=(1, 2), output=(), **options) -> SamplingRow:
    extra = {name: options.pop(name) for name in ("num_drafts", "memo", "grammar") if name in options}
    return SamplingRow(SamplingParams(**options), seed, len(output), prompt, list(output), **extra)


def chosen(logits: torch.Tensor, *rows: SamplingRow) -> list[int]:
    found = Sampler(logits.shape[1], CPU)(logits, rows)
    assert not any(sampled.error for sampled in found)
    return [sampled.token for sampled in found]


def drawn(logits: torch.Tensor, count: int, **options) -> torch.Tensor:
    """How often each token comes in draws at `count` places of logits [V]."""
    params = SamplingParams(**options)
    rows = [SamplingRow(params, 7, i, [], []) for i in range(count)]
    found = Sampler(len(logits), CPU)(logits.expand(count, -1), rows)
    return torch.bincount(torch.tensor([sampled.token for sampled in found]), minlength=len(logits))


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic is above what it is on average."""
    some = probabilities > 0
    assert not counts[~some].any()
    right = probabilities[some] * counts.sum()
    freedom = int(some.sum()) - 1
    return float(((counts[some] - right) ** 2 / right).sum() - freedom) / math.sqrt(2 * freedom)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.randn(VOCAB) * 1.5
    for options, kept in (
        ({}, slice(None)),
        ({"temperature": 0.6}, slice(None)),
        ({"top_k": 7}, slice(7)),
        ({"min_p": 0.1}, None),
        ({"top_p": 0.8}, None),
    ):
        scaled = logits / options.get("temperature", 1.0)
        values, order = scaled.softmax(-1).sort(descending=True)
        if "min_p" in options:
            kept = slice(int((values >= 0.1 * values[0]).sum()))
        if "top_p" in options:
            kept = slice(int((values.cumsum(-1) - values < 0.8).sum()))
        right = torch.zeros(VOCAB)
        right[order[kept]] = values[kept] / values[kept].sum()
        assert chi_square(drawn(logits, 20_000, **options), right) < 4


def test_noise_is_uniform_and_without_correlation() -> None:
    """Over tokens, over places, and over seeds that follow each other."""
    tokens = torch.arange(2**12, dtype=torch.int32)
    for places in ([(0, i) for i in range(64)], [(i, 0) for i in range(64)], [(2**62 + i, 5) for i in range(64)]):
        noise = gumbel(torch.tensor(draw_keys(places)), tokens)
        uniform = torch.exp(-torch.exp(-noise.double()))  # the distribution of Gumbel noise
        counts = torch.bincount((uniform * 256).long().flatten(), minlength=256)
        assert abs(chi_square(counts, torch.full((256,), 1 / 256))) < 4
        for axis in (0, 1):
            near = torch.corrcoef(
                torch.stack((uniform.narrow(axis, 1, 63).flatten(), uniform.narrow(axis, 0, 63).flatten()))
            )
            assert abs(near[0, 1]) < 4 / math.sqrt(63 * 63)
        assert torch.isfinite(noise).all()


def test_the_noise_stays_what_it_is() -> None:
    """A seed gives the same draws in later versions, too."""
    keys = torch.tensor(draw_keys([(0, 0), (-5, 7)]))
    assert keys.tolist() == [[1293516399, -1492722385], [2028452007, -289203390]]
    noise = gumbel(keys, torch.tensor([0, 1, 100_000], dtype=torch.int32)).flatten().tolist()
    assert noise == pytest.approx([-1.054489, 0.843893, -0.232944, 1.663091, -0.430471, 0.531959], abs=1e-5)


def any_params() -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0, 1e-40, 0.3, 1.0, 5.0]),
            "top_k": st.integers(-1, VOCAB + 3),
            "top_p": st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 0.2, 1.0]),
            "repetition_penalty": st.sampled_from([0.7, 1.5]),
            "presence_penalty": st.sampled_from([-1.0, 0.5]),
            "frequency_penalty": st.sampled_from([-0.4, 2.0]),
            "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-20, 20)),
            "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=2),
            "stop_token_ids": st.just([3, 4]),
            "min_tokens": st.integers(0, 4),
            "logprobs": st.integers(-1, 5),
        },
    )


rows = st.lists(
    st.builds(
        lambda seed, prompt, output, num_drafts, options: row(
            seed, prompt, output, num_drafts=min(num_drafts, len(output)), **options
        ),
        st.integers(0, 2**63),
        st.lists(st.integers(0, VOCAB - 1), max_size=5),
        st.lists(st.integers(0, VOCAB - 1), max_size=6),
        st.integers(0, 3),
        any_params(),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(rows=rows, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_choice_depends_on_its_row_alone(rows, seed, dtype) -> None:
    logits = (torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)

    def choose(order: list[int]) -> list[Sampled]:
        asked = [replace(rows[i], memo=Memo()) for i in order]
        return Sampler(VOCAB, CPU, eos_token_ids=[5])(logits[order], asked)

    together, order = choose(list(range(len(rows)))), torch.randperm(len(rows)).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oncelm.engine.sampler.LOGITS_AT_ONCE", 2 * VOCAB)
        assert choose(list(range(len(rows)))) == together
    for i, other in zip(order, choose(order), strict=True):
        assert together[i] == other == choose([i])[0]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), options=any_params(), output=st.lists(st.integers(0, VOCAB - 1), max_size=8))
def test_options_do_what_those_of_transformers_do(seed, options, output) -> None:
    """What is drawn from is what transformers' processors leave."""
    options = {**options, "temperature": max(options.get("temperature", 1.0), 0.3)}
    one = row(seed, [1, 2, 3], output, **options)
    params = one.params
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    right = logits.clone()
    for token, bias in (params.logit_bias or {}).items():
        right[:, token] += bias
    if params.allowed_token_ids:
        right[:, [i for i in range(VOCAB) if i not in params.allowed_token_ids]] = -math.inf
    if len(output) < params.min_tokens:
        right[:, list(params.stop_token_ids or ())] = -math.inf
    if params.repetition_penalty != 1:
        right = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([[1, 2, 3, *output]]), right)
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=VOCAB)
    right = right - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if not torch.isfinite(right).any():
        return
    for warper in (
        TemperatureLogitsWarper(params.temperature),
        MinPLogitsWarper(params.min_p) if params.min_p else None,
        TopKLogitsWarper(params.top_k) if params.top_k > 0 else None,
        TopPLogitsWarper(params.top_p) if params.top_p < 1 else None,
    ):
        right = right if warper is None else warper(None, right)
    sampler, seen = Sampler(VOCAB, CPU), []
    narrow = sampler._narrow
    sampler._narrow = lambda *args: seen.append(narrow(*args)) or seen[-1]  # what is drawn from
    sampler(logits, [one])
    torch.testing.assert_close(seen[0][0].softmax(-1), right.softmax(-1), rtol=1e-4, atol=1e-6)


def test_of_equal_logits_the_first_ones_are_kept() -> None:
    logits = torch.zeros(9)
    logits[4:] = 1.0
    assert drawn(logits, 200, top_k=1)[4] == 200
    assert drawn(logits, 200, top_k=3)[4:7].sum() == 200
    assert drawn(torch.zeros(8), 200, top_p=0.5).nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_all_are_sorted_only_where_the_likeliest_do_not_do() -> None:
    flat, peaked = torch.randn(3000), torch.randn(3000) * 6
    logits = torch.stack((flat, peaked, flat, flat, peaked))
    asked = [{"top_p": 0.9}, {"top_p": 0.9}, {"top_k": 1024}, {"top_k": 1025, "top_p": 0.99}, {"top_k": 2000}]
    rows, sorted_ones = ([row(3, **options) for options in asked] for _ in range(2))
    for one in sorted_ones:
        one.memo.is_flat = True
    assert Sampler(3000, CPU)(logits, rows) == Sampler(3000, CPU)(logits, sorted_ones)
    assert [one.memo.is_flat for one in rows] == [True, False, False, False, False]
    sampler = Sampler(3000, CPU)
    left = (sampler._narrow(logits - logits.amax(-1, keepdim=True), rows)[0] > -math.inf).sum(-1).tolist()
    probabilities = logits.softmax(-1).sort(descending=True).values[:2]
    assert left[:2] == (probabilities.cumsum(-1) - probabilities < 0.9).sum(-1).tolist()
    assert (left[2], left[4]) == (1024, 2000)


def test_greedy_rows_take_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -math.inf]] * 3)
    assert chosen(logits, row(temperature=0), row(temperature=0), row(temperature=0)) == [1, 1, 1]
    assert chosen(logits, row(temperature=0, logit_bias={2: 0.1}), row(temperature=0), row(top_k=1)) == [2, 1, 1]
    assert Sampler(4, CPU)(logits[:0], []) == []


def test_counts_are_kept_and_drafts_are_not() -> None:
    """Many answers, side by side, with drafts that are not taken up: as if each were counted anew at every place."""
    sampler, memos = Sampler(VOCAB, CPU), [Memo() for _ in range(20)]
    outputs: list[list[int]] = [[] for _ in memos]
    options = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2, "temperature": 0.7}
    for step in range(12):
        logits, kept, fresh = torch.randn(40, VOCAB), [], []
        for i, memo in enumerate(memos):
            for drafts in ([], [step, i]):
                with_drafts = [*outputs[i], *drafts]
                common = {"num_drafts": len(drafts), **options}
                kept.append(row(i, [i, 0], with_drafts, memo=memo, **common))
                fresh.append(row(i, [i, 0], with_drafts, **common))
        found = sampler(logits, kept)
        assert found == Sampler(VOCAB, CPU)(logits, fresh)
        for output, sampled in zip(outputs, found[::2], strict=True):
            output.append(sampled.token)
    assert len(sampler._penalties._in_output) == 32
    del memo, kept, fresh
    memos.clear()
    gc.collect()
    assert sorted(sampler._penalties._free) == list(range(32))


def test_logits_that_are_not_finite_fail_alone() -> None:
    logits = torch.randn(5, VOCAB)
    logits[0, 3] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3, 1:] = -math.inf
    for options in ({"temperature": 0}, {}, {"top_p": 0.5, "repetition_penalty": 2.0, "logprobs": 1}):
        found = Sampler(VOCAB, CPU)(logits, [row(**options) for _ in range(5)])
        assert [sampled.token for sampled in found[:4]] == [-1, -1, -1, 0]
        assert "not finite (NaN)" in found[0].error
        assert "not finite (infinite)" in found[1].error
        assert "not finite (all -inf)" in found[2].error
        assert found[3].error is found[4].error is None


def test_functions_of_the_user_fail_alone() -> None:
    def double(prompt, output, logits):
        assert (list(prompt), output, logits.dtype) == ([1, 2], [5], torch.float32)
        logits *= 2
        return logits

    def last(prompt, output, logits):
        return torch.where(torch.arange(VOCAB) == VOCAB - 1, logits.max() + 1, logits)

    def broken(prompt, output, logits):
        raise KeyError("no such thing")

    def short(prompt, output, logits):
        return logits[1:]

    def spoiled(prompt, output, logits):
        return logits * math.nan

    logits = torch.randn(6, VOCAB)
    before = logits.clone()
    functions = ([double], [double, last], [broken], [short], [lambda *args: None], [spoiled])
    rows = [row(output=[5], temperature=0, logits_processors=some) for some in functions]
    found = Sampler(VOCAB, CPU)(logits, rows)
    assert [sampled.token for sampled in found] == [int(logits[0].argmax()), VOCAB - 1, -1, -1, -1, -1]
    assert torch.equal(logits, before)
    assert found[2].error == "a logits processor raised KeyError: 'no such thing'"
    assert f"must return logits [{VOCAB}], got logits [{VOCAB - 1}]" in found[3].error
    assert "got a NoneType" in found[4].error
    assert "behind logits_processors are not finite (NaN)" in found[5].error


def test_what_must_not_come() -> None:
    tokenizer = TOKENIZERS["bytes"]
    size = len(tokenizer)
    end, a, b, c = tokenizer.eos_token_id, *tokenizer("abc").input_ids
    logits = torch.zeros(1, size)
    logits[0, [end, a, b, c]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    sampler = Sampler(size, CPU, tokenizer, [end])
    for output, options, right in (
        ([], {"min_tokens": 0}, end),
        ([], {"min_tokens": 1}, a),
        ([c], {"min_tokens": 1}, end),
        ([], {"min_tokens": 1, "stop_token_ids": [a]}, b),
        ([], {"min_tokens": 1, "ignore_eos": True}, end),
        ([], {"allowed_token_ids": [c, b]}, b),
        ([], {"allowed_token_ids": [c, b], "logit_bias": {c: 5.0, a: 100.0}}, c),
        ([], {"min_tokens": 1, "bad_words": ["a"]}, b),
        ([], {"min_tokens": 2, "bad_words": ["ca"]}, a),
        ([c], {"min_tokens": 2, "bad_words": ["ca"]}, b),
        ([b, c], {"min_tokens": 3, "bad_words": ["bca", "bc", "b"]}, c),
    ):
        assert sampler(logits, [row(output=output, temperature=0, **options)])[0].token == right
    nothing = sampler(
        logits.expand(2, -1), [row(temperature=0, allowed_token_ids=[a], bad_words=["a"]), row(temperature=0)]
    )
    assert (
        nothing[0].error
        == "no token may come here: allowed_token_ids, bad_words, min_tokens or the structure leave none."
    )
    assert nothing[1].token == end


def test_log_probabilities_are_of_the_models_own_logits() -> None:
    logits = torch.randn(2, VOCAB)
    asked = {"temperature": 0, "logprobs": 2, "logit_bias": {7: 100.0}, "repetition_penalty": 2.0}
    found = Sampler(VOCAB, CPU)(logits, [row(**asked), row(temperature=0)])
    right = logits[0].log_softmax(-1)
    assert found[1].logprobs is None
    assert found[0].token == 7
    assert list(found[0].logprobs) == [7, *right.topk(2).indices.tolist()]
    for token, logprob in found[0].logprobs.items():
        assert logprob.logprob == pytest.approx(float(right[token]), abs=1e-5)
        assert logprob.rank == int((right > right[token]).sum()) + 1


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu_without_waiting() -> None:
    logits = torch.randn(12, 5000) * 3
    asked = [
        {"temperature": 0},
        {},
        {"top_k": 9},
        {"top_p": 0.8},
        {"min_p": 0.1, "temperature": 0.7},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.1},
        {"logit_bias": {3: 4.0}, "allowed_token_ids": list(range(0, 5000, 3))},
        {"stop_token_ids": [4], "min_tokens": 4},
        {"top_k": 2000},
        {"logprobs": 3, "temperature": 0},
        {"temperature": 3.0, "top_p": 0.99},
        {"temperature": 0, "presence_penalty": 1.0},
    ]

    def rows() -> list[SamplingRow]:
        return [row(i, output=[5, i], num_drafts=i % 2, **options) for i, options in enumerate(asked)]

    right = Sampler(5000, CPU)(logits, rows())
    sampler, on_gpu = Sampler(5000, "cuda"), logits.cuda()
    found = sampler(on_gpu, rows())
    assert [sampled.token for sampled in found] == [sampled.token for sampled in right]
    assert found[9].logprobs.keys() == right[9].logprobs.keys()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler._choose_in_blocks(on_gpu, rows(), list(range(12)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
