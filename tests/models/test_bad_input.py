"""Wrong input is refused with a message that teaches, before anything has changed."""

from __future__ import annotations

import pytest
import torch

from tests.models.small import VOCAB, make_model


@pytest.fixture(scope="module")
def model():
    return make_model("retention")


IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[1, VOCAB]])}, f"input_ids has {VOCAB}; allowed: 0..{VOCAB - 1}"),
        ({"input_ids": torch.tensor([[-3, 1]])}, "input_ids has -3"),
        ({"input_ids": torch.tensor([1, 2])}, r"must be \[B, T\] integers"),
        ({"input_ids": torch.rand(1, 2)}, r"must be \[B, T\] integers"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids is empty"),
        ({}, "give input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(1, 2, 7)}, r"must be \[B, T, 32\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 3)}, r"attention_mask must be \[B, T\]"),
        ({"input_ids": IDS, "labels": torch.ones(1, 3, dtype=torch.long)}, r"labels must be \[B, T\]"),
        ({"input_ids": IDS, "labels": torch.full((1, 4), VOCAB)}, f"labels has {VOCAB}"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep must be 0"),
        ({"input_ids": IDS, "logits_to_keep": torch.tensor([4])}, "indices outside -4..3"),
        ({"input_ids": IDS, "logits_to_keep": torch.tensor([0.5])}, "logits_to_keep must be an int, a vector"),
        ({"input_ids": IDS, "logits_to_keep": torch.ones(1, 3, dtype=torch.bool)}, "a boolean logits_to_keep"),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise from 0"),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 4]), "attention_mask": torch.ones(1, 4)}, "not both"),
    ],
)
def test_forward(model, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_kept_padding_is_refused(model) -> None:
    keep = torch.tensor([[True, False, False, False]])
    with pytest.raises(ValueError, match="says are padding"):
        model(IDS, attention_mask=torch.tensor([[0, 1, 1, 1]]), logits_to_keep=keep)


def test_a_prompt_longer_than_the_cache_changes_nothing(model) -> None:
    cache = model.new_cache(1, 6)
    model.prefill(IDS, cache)
    before = cache.snapshot()
    with pytest.raises(ValueError, match="holds at most 6 tokens a sequence and has 4; 4 more do not fit"):
        model.prefill(IDS, cache, chunk_size=1)
    with pytest.raises(ValueError, match="do not fit"):
        model(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match=f"labels has {VOCAB}"):
        model(IDS[:, :2], labels=torch.full((1, 2), VOCAB), past_key_values=cache)
    with pytest.raises(ValueError, match="for a batch of 1, the input is a batch of 2"):
        model(IDS[:, :1].expand(2, 1), past_key_values=cache)
    after = cache.snapshot()
    assert after.lengths == before.lengths
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name], tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1"),
        ({"attention_mask": torch.zeros(1, 4)}, "without any token"),
    ],
)
def test_prefill(model, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.prefill(IDS, model.new_cache(1, 8), **arguments)


def test_prefill_needs_a_cache_and_a_prompt(model) -> None:
    with pytest.raises(ValueError, match="prefill fills, must be a cache"):
        model.prefill(IDS, None)
    with pytest.raises(ValueError, match="input_ids is empty"):
        model.prefill(IDS[:, :0], model.new_cache(1, 8))


def test_integers_of_any_width(model) -> None:
    expected = model(IDS, labels=IDS, logits_to_keep=0)
    found = model(IDS.to(torch.uint8), labels=IDS.int(), logits_to_keep=0)
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits))
    last = model.prefill(IDS.to(torch.uint8), model.new_cache(1, 8))
    torch.testing.assert_close(last, model.prefill(IDS, model.new_cache(1, 8)))
    with pytest.raises(ValueError, match="labels must be integers"):
        model(IDS, labels=IDS.float())


def test_new_cache_sizes(model) -> None:
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        model.new_cache(0)
    with pytest.raises(ValueError, match="max_tokens must be a whole number of at least 1"):
        model.new_cache(1, 0)


def test_a_cache_of_another_model(model) -> None:
    other = make_model("retention", num_self_decoder_layers=3)
    with pytest.raises(ValueError, match="belongs to another model"):
        model(IDS, past_key_values=other.new_cache(1, 8))


@pytest.mark.parametrize("changes", [{"num_self_heads": 4}, {"self_decoder": "sliding_window"}, {"hidden_size": 64}])
def test_a_cache_of_other_sizes_is_refused_unchanged(model, changes: dict) -> None:
    cache = make_model("retention", **changes).new_cache(1, 8)
    with pytest.raises(ValueError, match=f"made for a model with {next(iter(changes))}=.*belongs to another model"):
        model(IDS, past_key_values=cache)
    cache.check_whole()


def test_a_failed_forward_leaves_the_cache_unusable_not_wrong(model, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.new_cache(1, 20)
    model.prefill(IDS, cache)
    saved = cache.snapshot()
    expected = model(IDS, past_key_values=cache).logits
    cache.restore(saved)
    with monkeypatch.context() as patch:
        patch.setattr(model.cross_decoder.kv_layer_norm, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS, past_key_values=cache)
    for use in (
        lambda: model(IDS, past_key_values=cache),
        lambda: cache.crop(1),
        cache.snapshot,
        lambda: cache.select([0]),
    ):
        with pytest.raises(ValueError, match="failed midway"):
            use()
    cache.restore(saved)
    torch.testing.assert_close(model(IDS, past_key_values=cache).logits, expected)


def test_a_cached_pass_refuses_backward_loudly(model) -> None:
    logits = model(IDS, use_cache=True).logits
    with pytest.raises(RuntimeError, match="does not require grad"):
        logits.sum().backward()
    assert model(IDS, use_cache=False).logits.requires_grad
