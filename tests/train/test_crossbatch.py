"""Crossbatch from the command line: a LLaMA's folder becomes a LongLLaMA."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import oncelm
from oncelm.cli import main
from oncelm.data.read_ahead import ReadAhead
from oncelm.models import build_model
from oncelm.train.config import TrainConfig
from oncelm.train.setup import make_trainer
from oncelm.train.trainer import Trainer
from tests.models.test_longllama import make_llama

LONG = ["mem_layers=[1]", "max_position_embeddings=16", "cross_batch_range=3", "cross_batch_stepping=true"]
SETTINGS = [
    *(f"model_overrides.{setting}" for setting in LONG),
    *("crossbatch_rows=4", "seq_len=16", "batch_size=8", "grad_accumulation=2", "min_tokens=100", "eval_batches=3"),
    *("log_every=1", "eval_every=null", "warmup_steps=1", "lr=1e-2", "device=cpu", "report=[]"),
]


@pytest.fixture
def books(tmp_path) -> str:
    (tmp_path / "books").mkdir()
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text(f"Call me Ishmael, {number}. " * 60)
    return str(tmp_path / "books")


@pytest.fixture
def llama(tmp_path) -> str:
    make_llama(vocab_size=260).save_pretrained(tmp_path / "llama")
    oncelm.load_tokenizer("bytes").save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def logged(out: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_a_llama_becomes_a_longllama(books, llama, tmp_path, capsys) -> None:
    command = ["train", books, "--model", llama, "--out", str(tmp_path / "run"), "--steps", "20", "--set", *SETTINGS]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "memory layers    1 (of 3, from 0)" in shown
    assert "crossbatch       4 rows of 16 tokens from one piece of a document" in shown
    assert "rows seen      (positives, negatives) (0,0) (1,1) (2,1) (3,0)" in shown
    assert "tokens per step  256" in shown
    assert not (tmp_path / "run").exists()
    assert main(command) == 0
    losses = logged(tmp_path / "run")
    assert losses[-1] < 0.7 * losses[0]
    assert len(logged(tmp_path / "run", "validation_loss")) == 1
    trained = oncelm.load(tmp_path / "run" / "model", device="cpu")
    assert isinstance(trained, oncelm.LongLlamaForCausalLM)
    assert (trained.config.mem_layers, trained.config.dataset_packing) == ([1], 4)
    assert main([*command[:1], books, "--model", str(tmp_path / "run" / "model"), "--out", str(tmp_path / "b")]) == 2
    assert "this LongLLaMA trains with crossbatch (cross_batch_range 3): set crossbatch_rows" in capsys.readouterr().err
    more = ["crossbatch_rows=4", "model_overrides.cross_batch_range=7", *SETTINGS[5:]]  # more negatives, on from there
    command = ["train", books, "--model", str(tmp_path / "run" / "model"), "--out", str(tmp_path / "more")]
    assert main([*command, "--steps", "1", "--set", *more, "batch_size=8"]) == 0
    assert oncelm.load(tmp_path / "more" / "model").config.cross_batch_range == 7


def trainer_of(books: str, llama: str, out: Path, *settings: str) -> Trainer:
    options = {"data": books, "model": llama, "out": str(out), "steps": 4, "device": "cpu"}
    return make_trainer(TrainConfig.from_yaml(None, [*SETTINGS, *settings], **options))


def test_a_step_is_its_forward_passes_and_validation_reads_with_memory(books, llama, tmp_path) -> None:
    trainer = trainer_of(books, llama, tmp_path / "run")
    model = oncelm.load(llama, device="cpu", mem_layers=[1], max_position_embeddings=16).train()
    options = {"cross_batch_range": 3, "cross_batch_stepping": True, "dataset_packing": 4}
    batch = trainer.dataset.batch(0, 16).tokens
    passes = [model(rows, labels=rows, use_cache=False, **options).loss for rows in batch.split(8)]
    model.eval()
    whole = [part.tokens for part, _ in zip(trainer.dataset.validation_batches(8), range(3), strict=False)]
    assert whole[0].shape == (2, 61)
    targets = [part[:, 1:].numel() for part in whole]
    with torch.no_grad():
        losses = [model(part, labels=part).loss.item() * count for part, count in zip(whole, targets, strict=True)]
    assert trainer.evaluate() == pytest.approx(sum(losses) / sum(targets), rel=1e-5)
    trainer.config.__dict__["steps"] = 1
    assert trainer.train().loss == pytest.approx(torch.stack(passes).mean().item(), rel=1e-5)


def test_checkpointing_changes_nothing(books, llama, tmp_path) -> None:
    """The memory layers' share of the gradients, through rows before, included."""
    for name, settings in (("plain", ()), ("checkpointing", ("activation_checkpointing=true",))):
        trainer_of(books, llama, tmp_path / name, *settings).train()
    for value in ("loss", "grad_norm"):
        plain = logged(tmp_path / "plain", value)
        assert logged(tmp_path / "checkpointing", value) == pytest.approx(plain, rel=1e-5)


def test_stopped_and_resumed_it_repeats_the_losses(books, llama, tmp_path, monkeypatch) -> None:
    trainer_of(books, llama, tmp_path / "whole").train()
    batch = ReadAhead.batch

    def stop_in_step_3(self, step: int, batch_size: int, rows: slice | None = None):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, batch_size, rows)

    monkeypatch.setattr(ReadAhead, "batch", stop_in_step_3)
    assert trainer_of(books, llama, tmp_path / "parts").train().interrupted
    monkeypatch.undo()
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    for value in ("loss", "grad_norm", "validation_loss"):
        assert logged(tmp_path / "parts", value) == logged(tmp_path / "whole", value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["batch_size=6"], "batch_size 6 is not divisible by crossbatch_rows 4"),
        (["model_overrides.mem_layers=[1, 3]"], "mem_layers must be layers of the model, 0..2, got [1, 3]"),
        (["model_overrides.mem_layers=[]"], "crossbatch_rows is for LongLLaMA models"),
        (["model_overrides.cross_batch_range=0"], "crossbatch_rows needs model_overrides.cross_batch_range"),
        (["model_overrides.dataset_packing=2"], "model_overrides.dataset_packing 2 contradicts crossbatch_rows 4"),
        (["model_overrides.mem_layer=[1]"], "did you mean 'mem_layers'"),
        (["seq_len=32"], "at most max_position_embeddings = 16 tokens; got seq_len 32"),
        (["crossbatch_rows=null"], "trains with crossbatch (cross_batch_range 3): set crossbatch_rows"),
        (["document_masking=true"], "crossbatch_rows does not go with document_masking"),
        (["context_parallel=2"], "crossbatch_rows does not go with context_parallel"),
        (["tensor_parallel=2"], "crossbatch_rows does not go with tensor_parallel"),
        (["task=sft", "min_tokens=null"], 'crossbatch_rows is for task "pretrain"'),
        (["min_tokens=0"], "min_tokens must be"),
        (
            ["model=yoco-tiny", "model_overrides={}"],
            "is for LongLLaMA models; 'yoco-tiny' has no memory",
        ),
        (
            ["model=llama-tiny", "model_overrides={}"],
            "is for LongLLaMA models; 'llama-tiny' has no memory",
        ),
        (["--processes", "4", "--dry-run"], "the 2 of a step (grad_accumulation) do not divide among 4 processes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_before_anything_is_written(books, llama, tmp_path, capsys, settings, message) -> None:
    command = ["train", books, "--model", llama, "--out", str(tmp_path / "run"), "--set", *SETTINGS]
    assert main([*command, *settings]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "books" / ".oncelm").exists()


def test_documents_too_short_for_the_packing(books, llama, tmp_path, capsys) -> None:
    command = ["train", books, "--model", llama, "--out", str(tmp_path / "run"), "--set", *SETTINGS]
    assert main([*command, "min_tokens=5000"]) == 2
    assert "has no document of min_tokens = 5000 tokens" in capsys.readouterr().err
    assert main([*command, "crossbatch_rows=200", "batch_size=200"]) == 2
    assert "crossbatch_rows 200 of 16 tokens take 3001: source 'books' has" in capsys.readouterr().err


def test_a_preset_with_memory_layers_is_a_longllama() -> None:
    model = build_model("llama-tiny", vocab_size=64, mem_layers=[1, 2], max_position_embeddings=32)
    assert isinstance(model, oncelm.LongLlamaForCausalLM)
    assert torch.isfinite(model(torch.arange(50)[None], labels=torch.arange(50)[None]).loss)
    with pytest.raises(ValueError, match="did you mean 'mem_dtype'"):
        build_model("llama-tiny", mem_layers=[1], mem_dtypes="int8")
