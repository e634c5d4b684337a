"""The scripts of examples/ run, at a size that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oncelm import load, load_tokenizer
from tests.models.test_longllama import make_llama

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dictionary_lookup(tmp_path) -> None:
    out = tmp_path / "lookup.jsonl"
    options = ("--minutes", "0.05", "--words", "4", "--symbols", "64", "--width", "16", "--rows", "4")
    run("dictionary_lookup.py", *options, "--lengths", "12,600", "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["length"] for line in lines] == [12, 600]
    assert all(0 <= line["accuracy"] <= 1 for line in lines)


def test_windows_read_in_parallel_are_those_read_in_turn(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from dictionary_lookup import Task, make_model, read_dictionary

    task = Task(words=4, symbols=20)
    model = make_model(task, 16, seed=0).eval()
    tokens = task.entries(12, torch.Generator().manual_seed(0)).view(-1, task.context)
    cache = model.new_cache(1)
    with torch.no_grad():
        for window in tokens:
            model(window[None], past_key_values=cache)
            cache.spill()
        read, expected = read_dictionary(model, tokens).tensors, cache.snapshot().tensors
    for name in ("layers.2.memory_k", "layers.2.memory_v"):
        torch.testing.assert_close(read[name], expected[name])


def test_longllama_finetune(tmp_path) -> None:
    make_llama(vocab_size=260).save_pretrained(tmp_path / "llama")
    load_tokenizer("bytes").save_pretrained(tmp_path / "llama")
    (tmp_path / "books").mkdir()
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text(f"Call me Ishmael, {number}. " * 100)
    options = ("--mem-layers", "1", "--window", "16", "--steps", "3", "--held-out", "1", "--checkpointing")
    run("longllama_finetune.py", tmp_path / "llama", tmp_path / "books", "--out", tmp_path / "run", *options)
    trained = load(tmp_path / "run" / "model", device="cpu")
    assert trained.config.mem_layers == [1]
    assert trained.config.max_position_embeddings == 16
