"""The dictionary-lookup study: its documents can be answered, its shortcut reads as a cache does, its script runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "longllama"))
    import dictionary

    yield dictionary
    del sys.modules["dictionary"]


@pytest.mark.parametrize("seed", range(4))  # both kinds of batches
def test_every_question_is_defined_in_the_context_before_it(study, seed: int) -> None:
    rows = study.documents(3, 16, torch.Generator().manual_seed(seed)).view(3, 2, 16, study.ENTRY)
    for definitions, questions in rows:
        assert not torch.equal(definitions, questions)
        assert sorted(definitions.tolist()) == sorted(questions.tolist())
    words = rows[:, 0, :, :-1].flatten(0, 1)
    assert len(words.unique(dim=0)) == 3 * 16


def test_words_of_a_dictionary_differ(study) -> None:
    codes = torch.arange(study.SYMBOLS ** (study.ENTRY - 1))
    words = study.entries(codes, torch.arange(study.SYMBOLS), torch.Generator().manual_seed(0))[:, :-1]
    assert len(words.unique(dim=0)) == len(codes)
    assert words.max() < study.SYMBOLS


def test_windows_read_side_by_side_equal_windows_read_in_turn(study) -> None:
    model = study.make_model(torch.device("cpu"), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(study.SYMBOLS, (5, study.ENTRY * study.WORDS), generator=generator)
    question = torch.randint(study.SYMBOLS, (1, 12), generator=generator)
    in_turn, side_by_side = model.new_cache(1), model.new_cache(1)
    for window in windows:
        model(window[None], past_key_values=in_turn, logits_to_keep=1)
        in_turn.spill()
    side_by_side.restore(study.read(model, windows))
    expected, found = (model(question, past_key_values=cache).logits for cache in (in_turn, side_by_side))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_script_runs(study, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(study, "WORDS", 8)
    options = ["--minutes", "0.005", "--lengths", "32,128", "--questions", "8", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["dictionary.py", "--out", str(tmp_path / "out"), *options])
    study.main()
    lines = [json.loads(line) for line in (tmp_path / "out" / "lookup.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [32, 128]
    assert all(0 <= line["accuracy"] <= 1 and line["steps"] > 0 for line in lines)
    assert (tmp_path / "out" / "lookup.png").read_bytes().startswith(b"\x89PNG")
