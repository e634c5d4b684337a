"""The property everything rests on: however tokens come in and whichever logits are asked for, they are the same.

full forward = prefill + decode = chunked prefill + decode = several turns on one cache
padded batch = each sequence alone = packed sequences
cross-decoder at all positions = cross-decoder only where logits are asked for

The same but for rounding: each way is compared with float64, and may be off by a small multiple of what the full
forward pass is off (reference.py).
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.reference import whole, whole_rows
from tests.models.small import KINDS, VOCAB, make_model

kinds = pytest.mark.parametrize("kind", [*KINDS, "ill-conditioned"])
seeds = st.integers(0, 2**31)


def draw_ids(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@kinds
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=seeds, B=st.integers(1, 3), T=st.integers(1, 40))
def test_any_pieces_on_one_cache_give_the_full_forward(models, kind, data, seed, B, T) -> None:
    """Several turns of several tokens, decode steps among them: each piece's logits are the full forward's."""
    model, ids = models(kind), draw_ids(seed, B, T)
    expected = whole(model, ids)
    cache = model.new_cache(B, data.draw(st.sampled_from([None, T, T + 5])))
    place = 0
    while place < T:
        length = data.draw(st.sampled_from([1, 1, 2, 3, 9, 20]))
        piece = ids[:, place : place + length]
        logits = model(piece, past_key_values=cache).logits
        expected[:, place : place + piece.shape[1]].check(logits)
        place += piece.shape[1]
    assert cache.num_tokens == T


@kinds
@settings(max_examples=10, deadline=None)
@given(seed=seeds, T=st.integers(1, 40), chunk_size=st.integers(1, 45), extra=st.integers(1, 10))
def test_chunked_prefill_then_decode(models, kind, seed, T, chunk_size, extra) -> None:
    model, ids = models(kind), draw_ids(seed, 2, T + extra)
    expected = whole(model, ids)
    cache = model.new_cache(2, T + extra)
    last = model.prefill(ids[:, :T], cache, chunk_size=chunk_size)
    expected[:, T - 1].check(last)
    for t in range(T, T + extra):
        step = model(ids[:, t : t + 1], past_key_values=cache).logits
        expected[:, t].check(step[:, 0])


@kinds
def test_prefill_may_be_called_again(models, kind) -> None:
    model, ids = models(kind), draw_ids(3, 1, 30)
    cache = model.new_cache(1, 30)
    model.prefill(ids[:, :11], cache, chunk_size=4)
    last = model.prefill(ids[:, 11:], cache, chunk_size=7)
    whole(model, ids)[:, -1].check(last)


@kinds
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=seeds, B=st.integers(1, 3), T=st.integers(1, 30))
def test_any_subset_of_positions(models, kind, data, seed, B, T) -> None:
    """The fourth rung: an int, indices in any order and repeated, or a mask."""
    model, ids = models(kind), draw_ids(seed, B, T)
    expected = whole(model, ids)
    count = data.draw(st.integers(1, T + 2))
    last = model(ids, use_cache=False, logits_to_keep=count).logits
    expected[:, -count:].check(last)
    index = torch.tensor(data.draw(st.lists(st.integers(-T, T - 1), min_size=1, max_size=8)))
    some = model(ids, use_cache=False, logits_to_keep=index).logits
    expected[:, index].check(some)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).view(B, T)
    masked = model(ids, use_cache=False, logits_to_keep=mask).logits
    expected[mask].check(masked)


@kinds
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=seeds, T=st.integers(2, 24), steps=st.integers(0, 4))
def test_padding_anywhere_changes_nothing(models, kind, data, seed, T, steps) -> None:
    """Left, right and scattered padding: each row's logits are those of its tokens alone, in decoding too."""
    model, ids = models(kind), draw_ids(seed, 3, T + steps)
    side = data.draw(st.sampled_from(["left", "right", "scattered"]))
    mask = torch.ones(3, T, dtype=torch.long)
    for row in range(3):
        pads = data.draw(st.integers(0, T - 1))
        where = {
            "left": range(pads),
            "right": range(T - pads, T),
            "scattered": data.draw(st.sets(st.integers(0, T - 1), max_size=T - 1)),
        }[side]
        mask[row, list(where)] = 0
    cache = model.new_cache(3, T + steps)
    logits = model(ids[:, :T], attention_mask=mask, past_key_values=cache).logits
    uncached = model(ids[:, :T], attention_mask=mask, use_cache=False).logits
    pieces = [logits]
    for step in range(steps):
        so_far = torch.cat((mask, torch.ones(3, step + 1, dtype=torch.long)), dim=1)
        token = ids[:, T + step : T + step + 1]
        pieces.append(model(token, attention_mask=so_far, past_key_values=cache).logits)
    together = torch.cat(pieces, dim=1)
    whole_mask = torch.cat((mask, torch.ones(3, steps, dtype=torch.long)), dim=1).bool()
    for row, alone in enumerate(whole_rows(model, [ids[row][whole_mask[row]] for row in range(3)])):
        alone.check(together[row][whole_mask[row]])
        alone[: int(mask[row].sum())].check(uncached[row][mask[row].bool()])
    assert (together[~whole_mask] == 0).all()
    assert (uncached[mask == 0] == 0).all()


@kinds
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=seeds, T=st.integers(2, 24), chunk_size=st.integers(1, 30))
def test_padded_prefill(models, kind, data, seed, T, chunk_size) -> None:
    model, ids = models(kind), draw_ids(seed, 2, T)
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, : data.draw(st.integers(0, T - 1))] = 0
    mask[1, T - data.draw(st.integers(0, T - 1)) :] = 0 if T > 1 else 1
    mask[1, 0] = 1
    last = model.prefill(ids, model.new_cache(2, T), chunk_size=chunk_size, attention_mask=mask)
    for row, alone in enumerate(whole_rows(model, [ids[row][mask[row].bool()] for row in range(2)])):
        alone[-1].check(last[row])


@kinds
@settings(max_examples=10, deadline=None)
@given(seed=seeds, lengths=st.lists(st.integers(0, 15), min_size=1, max_size=4).filter(sum))
def test_packed_sequences(models, kind, seed, lengths) -> None:
    """cu_seqlens: every sequence as if alone, empty ones too, and with a cache for a second turn."""
    model = models(kind)
    ids = draw_ids(seed, 1, sum(lengths))
    borders = torch.tensor([0, *lengths]).cumsum(0)
    packed = model(ids, cu_seqlens=borders, use_cache=False).logits
    cached = model(ids, cu_seqlens=borders, use_cache=True)
    again = model(ids.flip(1), cu_seqlens=borders, past_key_values=cached.past_key_values).logits
    spans = [(start, end) for start, end in pairwise(borders.tolist()) if start < end]
    turns = [torch.cat((ids[0, start:end], ids.flip(1)[0, start:end])) for start, end in spans]
    for (start, end), expected in zip(spans, whole_rows(model, turns), strict=True):
        for first in (packed, cached.logits):
            expected[: end - start].check(first[0, start:end])
        expected[end - start :].check(again[0, start:end])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=seeds, T=st.integers(2, 20), padded=st.booleans())
def test_loss_and_gradients_on_any_targets(kind, data, seed, T, padded) -> None:
    """Ignored targets cost no cross-decoder work and change neither the loss nor a gradient."""
    model, ids = make_model(kind), draw_ids(seed, 2, T)
    labels = ids.clone()
    labels[torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * T, max_size=2 * T))).view(2, T)] = -100
    mask = torch.ones(2, T, dtype=torch.long)
    if padded:
        mask[0, : data.draw(st.integers(0, T - 2))] = 0
        labels[mask == 0] = -100
        labels[0, int((mask[0] == 0).sum())] = -100  # the first token of a sequence is nobody's target
    results = []
    for by_hand in (False, True):
        model.zero_grad()
        if by_hand:
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            targets = labels[:, 1:]
            summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            loss = summed / max(int((targets != -100).sum()), 1)
        else:
            loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-4, atol=2e-4)
    for name, got in results[0][1].items():
        expected = results[1][1][name]
        if got is None or expected is None:
            assert all(gradient is None or not gradient.any() for gradient in (got, expected)), name
        else:
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4)


@kinds
def test_cross_decoder_never_sees_an_unwanted_position(models, kind) -> None:
    model, ids = models(kind), draw_ids(0, 2, 12)
    if model.cross_decoder is None:
        pytest.skip("no cross-decoder")
    seen: list[int] = []
    behind = [
        model.cross_decoder.layers[i]
        for place, (which, i) in enumerate(model.config.layer_order)
        if which == "cross" and all(later == "cross" for later, _ in model.config.layer_order[place:])
    ]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
        for layer in behind
    ]
    labels = torch.full_like(ids, -100)
    labels[0, 5] = labels[1, 9] = 3
    model(ids, use_cache=False, logits_to_keep=2)
    model(ids, use_cache=False, logits_to_keep=torch.tensor([1, 4, 7]))
    model.train()
    model(ids, labels=labels)
    model.eval()
    model(ids, labels=labels, logits_to_keep=torch.empty(0, dtype=torch.long))
    cache = model.new_cache(2, 12)
    model.prefill(ids, cache, chunk_size=5)
    for hook in hooks:
        hook.remove()
    n = len(behind)
    assert n > 0
    assert seen == [4] * n + [6] * n + [2] * n + [2] * n + [2] * n


def test_the_ill_conditioned_model_is_one(models) -> None:
    """Its first tokens' logits are lost to rounding by the plain forward pass itself; the checks have to bear it."""
    model, ids = models("ill-conditioned"), torch.arange(VOCAB)[:, None]
    reference = whole(model, ids)
    assert reference.error.max() > 2e-4
    assert reference.error.max() > 100 * whole(models("retention"), ids).error.max()
    answers = model(ids, use_cache=False).logits.detach()
    reference.check(answers)
    for wrong in (answers + 1e-2, answers.roll(1, dims=0), answers * torch.nan):
        with pytest.raises(AssertionError, match="off by"):
            reference.check(wrong)


def test_labels_and_logits_together(models) -> None:
    model, ids = models("retention"), draw_ids(0, 2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    both = model(ids, labels=labels, logits_to_keep=2)
    torch.testing.assert_close(both.loss, model(ids, labels=labels).loss)
    whole(model, ids)[:, -2:].check(both.logits)
    every = model(ids, labels=labels, logits_to_keep=0)
    whole(model, ids).check(every.logits)


def test_packed_labels_do_not_cross_borders(models) -> None:
    model, ids = models("window"), draw_ids(1, 1, 10)
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 4, 10])).loss
    parts = [model(ids[:, a:b], labels=ids[:, a:b]).loss * (b - a - 1) for a, b in ((0, 4), (4, 10))]
    torch.testing.assert_close(packed, sum(parts) / 8)
