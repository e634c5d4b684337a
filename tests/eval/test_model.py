"""A reader gives what the model's full forward gives, however the text was read, returned in, and read on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm import load_tokenizer
from oncelm.eval import LanguageModel
from oncelm.eval import model as module
from oncelm.models import LongLlamaConfig, LongLlamaForCausalLM
from tests.eval.conftest import KINDS
from tests.models.test_longllama import make_llama


def full_scores(model: LanguageModel, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log-likelihoods, greedy) of every token but the first, from one forward pass."""
    row = torch.tensor(ids, dtype=torch.long)[None]
    with torch.no_grad():
        logits = model.model(row, use_cache=False).logits[0, :-1].double()
    chosen = logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
    return chosen.numpy(), (logits.argmax(-1) == row[0, 1:]).numpy()


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 260, count).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=3, unique=True).map(sorted), block=st.integers(1, 50))
def test_scores_are_those_of_the_full_forward(kind, cuts, block, language_models) -> None:
    model, ids = language_models(kind), random_ids(40)
    expected, greedy = full_scores(model, ids)
    first = cuts[0] if cuts else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOGITS_AT_ONCE", 260 * block)
        reader = model.start(40)
        reader.read(ids[:first])
        parts = [reader.score(ids[a:b]) for a, b in zip([first, *cuts[1:]], [*cuts[1:], 40], strict=True)]
    got = np.concatenate([part.log_likelihoods for part in parts])
    np.testing.assert_allclose(got, expected[first - 1 :], atol=2e-4)
    assert (np.concatenate([part.greedy for part in parts]) == greedy[first - 1 :]).all()


def test_a_longllama_is_scored_window_by_window_with_the_local_cache_asked_for(monkeypatch) -> None:
    llama, ids = make_llama(vocab_size=260), random_ids(200)
    config = LongLlamaConfig(**llama.config.to_dict() | {"mem_layers": [1], "last_context_length": 24})
    long = LongLlamaForCausalLM(config).eval()
    long.load_state_dict(llama.state_dict())
    found = {}
    for local, budget in ((24, 1 << 20), (24, 260 * 7), (8, 1 << 20)):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", budget)
        model = LanguageModel(long, load_tokenizer("bytes"), "long", read_options={"last_context_length": local})
        reader = model.start(200)
        reader.read(ids[:1])
        found[local, budget] = reader.score(ids[1:]).log_likelihoods
    assert (found[24, 1 << 20] == found[24, 260 * 7]).all()  # whatever fits in memory
    assert np.abs(found[24, 1 << 20] - found[8, 1 << 20]).max() > 1e-4
    assert LanguageModel(long, load_tokenizer("bytes"), "long").describe()["last_context_length"] == 24


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_the_likeliest_tokens(kind, language_models) -> None:
    model, ids = language_models(kind), random_ids(20)
    row = torch.tensor(ids, dtype=torch.long)[None]
    for _ in range(6):
        with torch.no_grad():
            row = torch.cat([row, model.model(row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    wanted = row[0, 20:].tolist()
    reader = model.start(26)
    reader.read(ids[:7])
    reader.read(ids[7:])
    assert reader.generate(6) == wanted
    stopped = model.start(26)
    stopped.read(ids)
    assert stopped.generate(6, lambda so_far: len(so_far) == 2) == wanted[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_reads_another_text(kind, language_models) -> None:
    model, ids = language_models(kind), random_ids(20)
    fresh, used = model.start(26), model.start(26)
    used.read(random_ids(9, 3))
    used.mark()
    used.generate(5)
    used.restart()
    for reader in (fresh, used):
        reader.read(ids)
        assert reader.num_tokens == 20
    assert used.generate(6) == fresh.generate(6)


def test_end_of_text_ends_it(language_models) -> None:
    model, ids = language_models("retention"), random_ids(20)
    reader = model.start(30)
    reader.read(ids)
    first = reader.generate(1)[0]
    model.model.generation_config.eos_token_id = [first]
    try:
        again = model.start(30)
        again.read(ids)
        assert again.generate(5) == []
    finally:
        model.model.generation_config.eos_token_id = None


@pytest.mark.parametrize("kind", KINDS)
def test_marks_are_places_to_return_to(kind, language_models) -> None:
    model = language_models(kind)
    start, middle, *ends = (random_ids(15, seed) for seed in range(5))
    reader = model.start(80)
    reader.read(start)
    early = reader.mark()
    reader.read(middle)
    late = reader.mark()
    for mark, before in ((late, [start, middle]), (late, [start, middle]), (early, [start]), (early, [start])):
        for end in ends:
            reader.rewind(mark)
            expected, _ = full_scores(model, np.concatenate([*before, end]))
            np.testing.assert_allclose(reader.score(end).log_likelihoods, expected[-len(end) :], atol=2e-4)
            reader.generate(3)


def test_misuse_teaches(language_models) -> None:
    reader = language_models("llama").start(10)
    with pytest.raises(ValueError, match="nothing has been read yet"):
        reader.score(random_ids(3))
    reader.read(random_ids(8))
    with pytest.raises(ValueError, match="10 tokens has 8; 3 more"):
        reader.read(random_ids(3))


def test_the_fingerprint_tells_models_and_tokenizers_apart(language_models) -> None:
    one, other = language_models("llama").describe(), language_models("retention").describe()
    assert one["weights"] != other["weights"]
    assert one == language_models("llama").describe()
    assert one["tokenizer"] == other["tokenizer"]


def test_how_keys_are_kept_is_told_beside_the_dtype_of_the_model(language_models) -> None:
    one = language_models("retention")
    told = LanguageModel(one.model, one.codec.tokenizer, "8 bits", cache_options={"dtype": torch.int8}).describe()
    assert (told["dtype"], told["kv_dtype"]) == (one.describe()["dtype"], "int8")
