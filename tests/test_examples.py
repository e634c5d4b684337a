"""The scripts of examples/ run, at a size that takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from oncelm import load, load_tokenizer
from tests.models.test_longllama import make_llama

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
