"""Classifiers of texts and tokens: transformers' own semantics, and only the positions that count are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from oncelm.models import longllama
from tests.models.small import VOCAB, make_long, make_model

close = {"rtol": 1e-4, "atol": 1e-5}
PAD = 1
families = pytest.mark.parametrize("kind", ["retention", "window", "long"])
AUTO = {"texts": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}


def make(kind: str, what: str, folder: Path, **changes):
    """A classifier from the folder of a causal language model, and a base model of the same weights."""
    whole = {"max_position_embeddings": 64, "last_context_length": 64}
    causal = make_long(pad_token_id=PAD, **whole) if kind == "long" else make_model(kind)
    causal.save_pretrained(folder)
    torch.manual_seed(1)
    model = AUTO[what].from_pretrained(folder, num_labels=3, **changes)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model, AutoModel.from_pretrained(folder)


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(2))


@families
def test_a_text_is_judged_by_its_last_token(kind: str, tmp_path: Path) -> None:
    model, base = make(kind, "texts", tmp_path)
    ids, mask, labels = draw_ids(3, 10), torch.ones(3, 10, dtype=torch.long), torch.tensor([2, 0, 1])
    mask[0, :4], mask[1, 6:] = 0, 0  # on the left, on the right
    ids[mask == 0] = PAD
    hidden = base(ids, attention_mask=mask, use_cache=False).last_hidden_state
    expected = model.score(hidden[[0, 1, 2], [9, 5, 9]])
    found = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.logits, expected, **close)
    torch.testing.assert_close(found.loss, F.cross_entropy(expected, labels), **close)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.score.parameters())
    # without a mask, by the padding token, whose rows on the right change nothing before them
    torch.testing.assert_close(model(ids[1:]).logits, expected[1:], **close)
    packed = model(torch.cat((ids[1:2, :6], ids[2:]), 1), cu_seqlens=torch.tensor([0, 6, 16]), labels=labels[1:])
    torch.testing.assert_close(packed.logits, expected[1:], **close)
    with pytest.raises(ValueError, match="an empty sequence"):  # its scores would be those of the one before
        model(ids[:1], cu_seqlens=torch.tensor([0, 6, 6, 10]))


@families
def test_tokens_with_labels_are_judged(kind: str, tmp_path: Path) -> None:
    model, base = make(kind, "tokens", tmp_path)
    ids, mask = draw_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    labels = torch.full((2, 10), -100)
    labels[0, [2, 5]], labels[1, 3:6] = 2, torch.tensor([0, 1, 2])  # one at padding, which counts for nothing
    hidden = base(ids, attention_mask=mask, use_cache=False).last_hidden_state
    expected = model.score(hidden)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, **close)
    found, counted = model(ids, attention_mask=mask, labels=labels), (labels != -100) & mask.bool()
    torch.testing.assert_close(found.logits, expected * counted[..., None], **close)
    torch.testing.assert_close(found.loss, F.cross_entropy(expected[counted], labels[counted]), **close)
    found.loss.backward()
    assert model.score.bias.grad.any()
    nothing = model(ids, labels=torch.full((2, 10), -100)).loss
    nothing.backward()
    assert nothing == 0
    with pytest.raises(ValueError, match=r"labels must be \[B, T\] = \[2, 10\]"):
        model(ids, labels=labels[:, 1:])


@pytest.mark.parametrize("what", ["texts", "tokens"])
def test_transformers_classifier_of_a_llama_says_the_same(what: str, tmp_path: Path) -> None:
    kinds = {"texts": LlamaForSequenceClassification, "tokens": LlamaForTokenClassification}
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**settings, num_attention_heads=4, pad_token_id=PAD, num_labels=3, max_position_embeddings=64)
    torch.manual_seed(0)
    llama = kinds[what](config).eval()
    llama.save_pretrained(tmp_path)
    ours = getattr(longllama, kinds[what].__name__.replace("Llama", "LongLlama"))
    model = ours.from_pretrained(tmp_path, mem_layers=[1], last_context_length=64)
    ids, mask = draw_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, 15:] = 0
    ids[mask == 0] = PAD
    labels = torch.tensor([0, 1, 2]) if what == "texts" else torch.where(mask == 1, ids % 3, -100)
    for given in ({"attention_mask": mask}, {}):
        expected, found = llama(ids, labels=labels, **given), model(ids, labels=labels, **given)
        shown = torch.ones(3, 1) if what == "texts" else mask[..., None]
        torch.testing.assert_close(found.logits * shown, expected.logits * shown, **close)
        torch.testing.assert_close(found.loss, expected.loss, **close)


@pytest.mark.parametrize("what", ["texts", "tokens"])
def test_the_cross_decoder_runs_on_the_positions_that_count(what: str, tmp_path: Path) -> None:
    model, _ = make("retention", what, tmp_path)
    ids, seen = draw_ids(2, 10), []
    for layer in model.cross_decoder.layers:
        layer.register_forward_hook(lambda module, given, output: seen.append(output.shape[0] * output.shape[1]))
    labels = torch.tensor([0, 1]) if what == "texts" else torch.where(ids % 4 == 0, 1, -100)
    model(ids, labels=labels)
    assert seen == [2 if what == "texts" else int((labels != -100).sum())] * 2
    found = model(ids, labels=labels, output_hidden_states=True)
    assert [x.shape for x in found.hidden_states] == [(2, 10, 32)] * 5


@families
@pytest.mark.parametrize("what", ["texts", "tokens"])
def test_it_is_saved_and_loaded(kind: str, what: str, tmp_path: Path) -> None:
    model, base = make(kind, what, tmp_path / "causal")
    ids = draw_ids(2, 10)
    model.save_pretrained(tmp_path / "classifier")
    again, info = AUTO[what].from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not any(info.values())
    assert again.num_labels == 3
    assert torch.equal(again(ids).logits, model(ids).logits)
    bare = AutoModel.from_pretrained(tmp_path / "classifier")
    assert torch.equal(bare(ids, use_cache=False)[0], base(ids, use_cache=False)[0])


@pytest.mark.parametrize(
    ("problem", "labels"), [("regression", torch.randn(2, 3)), ("multi_label_classification", torch.ones(2, 3))]
)
def test_other_problems_than_one_class(problem: str, labels: torch.Tensor, tmp_path: Path) -> None:
    model, _ = make("retention", "texts", tmp_path, problem_type=problem)
    found = model(draw_ids(2, 10), labels=labels)
    loss = {"regression": F.mse_loss, "multi_label_classification": F.binary_cross_entropy_with_logits}[problem]
    torch.testing.assert_close(found.loss, loss(found.logits, labels))


@families
def test_labels_and_texts_that_are_wrong_are_named(kind: str, tmp_path: Path) -> None:
    model, _ = make(kind, "texts", tmp_path)
    ids, mask = draw_ids(3, 5), torch.ones(3, 5, dtype=torch.long)
    for labels in (ids, torch.tensor([1, 2]), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"labels must be one a text, \[3\] or \[3, 3\], got"):
            model(ids, attention_mask=mask, labels=labels)
    mask[1] = 0
    with pytest.raises(ValueError, match="attention_mask hides all of text 1"):
        model(ids, attention_mask=mask)


def test_texts_without_a_mask_need_a_padding_token(tmp_path: Path) -> None:
    model, _ = make("retention", "texts", tmp_path)
    model.config.pad_token_id = None
    assert model(draw_ids(1, 5)).logits.shape == (1, 3)
    assert model(draw_ids(2, 5), attention_mask=torch.ones(2, 5, dtype=torch.long)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="which tokens of 2 texts are padding"):
        model(draw_ids(2, 5))
