"""The command line under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import oncelm
from oncelm.cli import main
from oncelm.data.tokenizers import load_tokenizer
from oncelm.models import build_model
from oncelm.train.checkpoint import find_checkpoint

pytestmark = pytest.mark.slow
SETTINGS = ["seq_len=16", "batch_size=4", "log_every=1", "warmup_steps=1", "save_every=null", "device=cpu"]


def start(out: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "oncelm"]
    return subprocess.Popen(
        [*command, "train", *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def steps(out: Path) -> list[int]:
    file = out / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return [line["step"] for line in lines if "loss" in line]


def workers(run: subprocess.Popen) -> list[psutil.Process]:
    return sorted(psutil.Process(run.pid).children(), key=lambda process: process.pid)


@pytest.fixture
def book(tmp_path) -> str:
    (tmp_path / "book.txt").write_text("It was a bright cold day in April, and the clocks were striking.\n" * 30)
    return str(tmp_path / "book.txt")


def wait_for_a_step(run: subprocess.Popen, out: Path) -> None:
    until = time.monotonic() + 120
    while not steps(out):
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.2)


def test_sigterm_to_any_worker_saves_and_exits_0_on_all(book, tmp_path) -> None:
    out = tmp_path / "run"
    run = start(out, book, "--tokenizer", "bpe:280", "--steps", "100000", "--set", *SETTINGS)
    wait_for_a_step(run, out)
    workers(run)[1].send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert output.count("Stopped after step") == 1
    assert output.count("step 1: loss") == 1
    (checkpoint,) = (out / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert main(["train", "--out", str(out), "--resume", "--steps", str(step + 1)]) == 0  # on one process
    assert steps(out) == list(range(1, step + 2))


def test_sigterm_to_torchrun_saves_whatever_status_it_gives(book, tmp_path) -> None:
    """It raises SignalException for every signal, even where all workers have exited with 0."""
    out = tmp_path / "run"
    run = start(out, book, "--steps", "100000", "--set", *SETTINGS)
    wait_for_a_step(run, out)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=120)
    assert output.count("Stopped after step") == 1
    assert "oncelm: error" not in output
    assert run.returncode == 1
    assert "SignalException" in output
    checkpoint = find_checkpoint(out / "checkpoints")
    oncelm.load(checkpoint, verify=True)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [checkpoint.name]


def test_a_folder_as_a_longllama_has_the_losses_of_one_process(book, tmp_path) -> None:
    build_model("llama-tiny", vocab_size=260).save_pretrained(tmp_path / "llama")
    load_tokenizer("bytes").save_pretrained(tmp_path / "llama")
    long = ["mem_layers=[1, 3]", "max_position_embeddings=16", "cross_batch_range=3", "cross_batch_stepping=true"]
    settings = [
        *SETTINGS,
        *(f"model_overrides.{setting}" for setting in long),
        "crossbatch_rows=2",
        "grad_accumulation=2",
    ]
    arguments = [book, "--model", str(tmp_path / "llama"), "--steps", "3", "--set", *settings]
    run = start(tmp_path / "two", *arguments)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert main(["train", *arguments, "--out", str(tmp_path / "one")]) == 0
    for value in ("loss", "grad_norm", "validation_loss"):
        one, two = (
            [line[value] for line in map(json.loads, (tmp_path / out / "metrics.jsonl").open()) if value in line]
            for out in ("one", "two")
        )
        assert two == pytest.approx(one, rel=1e-3)
    run = start(tmp_path / "three", *arguments, "grad_accumulation=3")
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "the 3 of a step (grad_accumulation) do not divide among 2 processes" in output
    assert not (tmp_path / "three").exists()


def test_a_worker_that_is_killed_ends_the_run_with_what_to_do(book, tmp_path) -> None:
    out = tmp_path / "run"
    run = start(out, book, "--steps", "100000", "--set", *SETTINGS)
    wait_for_a_step(run, out)
    workers(run)[1].kill()
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "oncelm: error: rank 0 lost another rank of the run" in output
