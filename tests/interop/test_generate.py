"""transformers' `generate` and its text-generation pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TextIteratorStreamer,
    pipeline,
)
from transformers.utils import logging

from tests.interop.families import draw_ids, families, make_one_window, tokenizer

pytestmark = pytest.mark.slow

TEXTS = ["The sky", "A much longer beginning of a text, with more bytes", "In 1999"]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: torch.Tensor, count: int = 8) -> list[int]:
    """The likeliest tokens after ids [T], each from a pass over the whole text."""
    for _ in range(count):
        logits = model(ids[None], use_cache=False).logits[0, -1]
        ids = torch.cat((ids, logits.argmax()[None]))
    return ids[-count:].tolist()


class OnlyThese(LogitsProcessor):
    """Forbids all other tokens."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forbidden = torch.full_like(scores, -float("inf"))
        return forbidden.index_copy(1, self.tokens, scores[:, self.tokens])


@families
def test_greedy_tokens_are_the_likeliest(family: str) -> None:
    model, ids = make_one_window(family), draw_ids(1, 20)
    expected = greedy(model, ids[0])
    for options in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(ids, **options, **GREEDY)[0, 20:].tolist() == expected


@families
def test_padded_rows_go_on_as_each_alone(family: str) -> None:
    model, words = make_one_window(family), tokenizer()
    words.padding_side = "left"
    found = model.generate(**words(TEXTS, return_tensors="pt", padding=True), **GREEDY)
    for text, row in zip(TEXTS, found, strict=True):
        assert row[-8:].tolist() == greedy(model, words(text, return_tensors="pt").input_ids[0])


@families
def test_a_second_turn_on_the_cache_of_the_first(family: str) -> None:
    model, ids = make_one_window(family), draw_ids(1, 20)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    text = torch.cat((first.sequences, draw_ids(1, 5, seed=4)), 1)
    second = model.generate(text, past_key_values=first.past_key_values, return_dict_in_generate=True, **GREEDY)
    assert second.sequences[0, -8:].tolist() == greedy(model, text[0])
    text = torch.cat((second.sequences, draw_ids(1, 40, seed=5)), 1)
    third = model.generate(text, past_key_values=second.past_key_values, **GREEDY)
    assert third[0, -8:].tolist() == greedy(model, text[0])


@families
def test_stop_strings_stop(family: str) -> None:
    model, words = make_one_window(family), tokenizer()
    inputs = words("The sky", return_tensors="pt")
    readable = torch.tensor(words("".join(map(chr, range(32, 127)))).input_ids)
    only_readable = LogitsProcessorList([OnlyThese(readable)])  # half a character is no text to stop at
    whole = model.generate(**inputs, logits_processor=only_readable, **GREEDY)
    start = inputs.input_ids.shape[1]
    text = words.decode(whole[0])
    stop = text[start + 2 : start + 4]
    first = next(end for end in range(start + 1, start + 5) if text[:end].endswith(stop))
    for stop_string, length in ((stop, first), ("never said", start + 8)):
        options = {"stop_strings": [stop_string], "tokenizer": words, "logits_processor": only_readable}
        assert torch.equal(model.generate(**inputs, **options, **GREEDY), whole[:, :length])


@families
def test_beams_and_samples_with_a_cache_are_those_without(family: str) -> None:
    model, ids = make_one_window(family), draw_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for options in (
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **{**GREEDY, **options}))
        assert torch.equal(*found)


@families
def test_scores_are_the_models_logits(family: str) -> None:
    model, ids = make_one_window(family), draw_ids(2, 20)
    found = model.generate(ids, return_dict_in_generate=True, output_scores=True, output_logits=True, **GREEDY)
    expected = model(found.sequences, use_cache=False).logits[:, 19:-1]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(found.scores, 1), expected, rtol=1e-4, atol=1e-4)


@families
def test_embeddings_in_place_of_ids(family: str) -> None:
    model, ids = make_one_window(family), draw_ids(2, 20)
    embeddings = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    found = model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, **GREEDY)[:, 20:])


@families
def test_a_streamer_gets_the_text(family: str) -> None:
    model, words = make_one_window(family), tokenizer()
    inputs = words("The sky", return_tensors="pt")
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    found = model.generate(**inputs, streamer=streamer, **GREEDY)
    assert "".join(streamer) == words.decode(found[0, inputs.input_ids.shape[1] :])


@families
def test_the_pipeline_writes_what_generate_writes(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = tokenizer()
    make_one_window(family).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    logging.enable_propagation()
    write = pipeline("text-generation", str(tmp_path), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    logging.disable_propagation()
    assert "is not supported" not in caplog.text
    for batch_size in (1, 3):
        found = write(TEXTS, batch_size=batch_size, max_new_tokens=8, do_sample=False, return_full_text=False)
        for text, answer in zip(TEXTS, found, strict=True):
            inputs = words(text, return_tensors="pt")
            expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
            assert answer[0]["generated_text"] == words.decode(expected, skip_special_tokens=True)
