"""The Hugging Face edge: Auto classes, every decoding mode of generate, checkpointing, Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, TextStreamer

import oncelm
from tests.models.small import KINDS, VOCAB, make_model

PLAIN = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
kinds = pytest.mark.parametrize("kind", ["retention", "window", "retention-only", "interleaved"])


def prompt(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is oncelm.YocoForCausalLM
    torch.testing.assert_close(again(prompt(2, 9)).logits, model(prompt(2, 9)).logits, rtol=0, atol=0)


@kinds
def test_greedy_modes_agree(models, kind: str) -> None:
    model, ids = models(kind), prompt(3, 20)
    expected = model.generate(ids, use_cache=False, **PLAIN)
    assert torch.equal(model.generate(ids, **PLAIN), expected)
    assert torch.equal(model.generate(ids, prefill_chunk_size=7, **PLAIN), expected)
    assert torch.equal(model.generate(ids, past_key_values=model.new_cache(3, 40), **PLAIN), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **PLAIN), expected)
    filled = model.new_cache(3, 40)
    model.prefill(ids[:, :13], filled)
    assert torch.equal(model.generate(ids, past_key_values=filled, **PLAIN), expected)


@kinds
def test_beams_agree_with_and_without_cache(models, kind: str) -> None:
    model, ids = models(kind), prompt(2, 11)
    expected = model.generate(ids, num_beams=3, use_cache=False, **PLAIN)
    assert torch.equal(model.generate(ids, num_beams=3, **PLAIN), expected)


@kinds
def test_left_padding(models, kind: str) -> None:
    model, ids = models(kind), prompt(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    together = model.generate(ids, attention_mask=mask, **PLAIN)
    alone = model.generate(ids[1:, 13:], **PLAIN)
    assert torch.equal(together[1, 13:], alone[0])


@kinds
def test_assisted_decoding_is_exact(models, kind: str) -> None:
    """A rejected draft is cropped away: retention states are rebuilt from the kept tokens."""
    model, ids = models(kind), prompt(1, 15)
    expected = model.generate(ids, **PLAIN)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **PLAIN), expected)
    assert torch.equal(model.generate(ids, assistant_model=make_model("window"), **PLAIN), expected)


def test_sampling_and_streaming(models, capsys: pytest.CaptureFixture) -> None:
    model, ids = models("retention"), prompt(1, 8)
    out = model.generate(ids, do_sample=True, top_k=5, max_new_tokens=6, num_return_sequences=3, pad_token_id=1)
    assert out.shape == (3, 14)
    tokenizer = oncelm.load_tokenizer("bytes")
    model.generate(ids, streamer=TextStreamer(tokenizer), **PLAIN)
    assert capsys.readouterr().out


def test_a_cache_of_another_kind_is_refused(models) -> None:
    model = models("retention")
    for other in (DynamicCache(), DynamicCache(config=model.config)):
        with pytest.raises(ValueError, match="must be a cache of this model"):
            model(prompt(1, 3), past_key_values=other)
    with pytest.raises(ValueError, match="unknown cache_implementation 'quantized'"):
        model.generate(prompt(1, 3), cache_implementation="quantized", **PLAIN)


@kinds
def test_gradient_checkpointing(kind: str) -> None:
    model, ids = make_model(kind).train(), prompt(2, 17)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_tuple_output_and_refused_options(models) -> None:
    model, ids = models("retention"), prompt(1, 5)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    with pytest.raises(ValueError, match="output_attentions=True is not offered"):
        model(ids, output_attentions=True)
    with pytest.raises(TypeError, match="position_idz"):
        model(ids, position_idz=None)


def test_embeddings_instead_of_ids(models) -> None:
    model, ids = models("retention"), prompt(2, 9)
    torch.testing.assert_close(model(inputs_embeds=model.embed_tokens(ids)).logits, model(ids).logits)


def test_official_initialisation() -> None:
    model = oncelm.build_model("yoco-tiny", tie_word_embeddings=False)
    d = model.config.hidden_size
    mixer = model.self_decoder.layers[0].mixer
    assert model.embed_tokens.weight.std().item() == pytest.approx(d**-0.5, rel=0.02)
    xavier = (6 / (d + d)) ** 0.5  # bound of the uniform distribution at gain 1
    assert mixer.q_proj.weight.abs().max().item() == pytest.approx(xavier * 2**-2.5, rel=0.01)
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(xavier * 2**-1, rel=0.01)
    assert model.cross_decoder.k_proj.weight.abs().max().item() == pytest.approx(d**-0.5, rel=0.01)
    assert model.output_projection.weight.abs().max().item() == pytest.approx(d**-0.5, rel=0.01)


def test_build_model_is_reproducible_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (oncelm.build_model("yoco-tiny", vocab_size=50, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model("retention").train()
    rows = [{"input_ids": row, "labels": row} for row in prompt(8, 16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[],
        use_cpu=True, logging_steps=4, save_strategy="no", eval_strategy="steps", eval_steps=6, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
