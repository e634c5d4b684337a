"""`oncelm train`, from the command line to a model folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import oncelm.models
from oncelm.cli import main
from oncelm.data.conversations import Conversation
from oncelm.data.read_ahead import ReadAhead
from oncelm.data.tokenizers import load_tokenizer
from oncelm.train.checkpoint import list_checkpoints
from oncelm.train.setup.dataset import digest_conversations
from oncelm.train.trainer import Trainer
from oncelm.utils.checksums import checksums

QUICK = ("--set", "seq_len=16", "batch_size=2", "log_every=1", "warmup_steps=1")


@pytest.fixture
def book(tmp_path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking.\n" * 30)
    return str(path)


def test_text_to_model_and_on_from_that_model(book, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["train", book, "--out", str(out), "--steps", "3", *QUICK]) == 0
    assert f"Model: {out / 'model'}" in capsys.readouterr().out
    model = oncelm.models.load(out / "model")
    assert model.config.vocab_size == 260
    assert model.generation_config.eos_token_id == 2
    more = ["train", book, "--out", str(tmp_path / "more"), "--model", str(out / "model"), "--steps", "1"]
    assert main([*more, *QUICK, "--dry-run"]) == 0
    assert main([*more, *QUICK]) == 0  # with the tokenizer in the model's folder
    assert main([*more, *QUICK, "model_overrides.hidden_size=64", f"out={tmp_path / 'wide'}"]) == 2
    assert "(Read with {'hidden_size': 64}, which its weights have to fit.)" in capsys.readouterr().err
    longer = ["train", book, "--out", str(tmp_path / "longer"), "--model", str(out / "model"), "--steps", "1"]
    assert main([*longer, *QUICK, "model_overrides.rope_theta=640000"]) == 0
    assert oncelm.models.load(tmp_path / "longer" / "model").config.rope_theta == 640_000


def test_a_new_run_leaves_the_tokenizer_of_another_alone(book, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["train", book, "--out", str(out), "--steps", "1", "--tokenizer", "bpe:280", *QUICK]) == 0
    before = (out / "tokenizer" / "tokenizer.json").read_bytes()
    (tmp_path / "other.txt").write_text("quite another text\n" * 100)
    other = ["train", str(tmp_path / "other.txt"), "--out", str(out), "--steps", "1", "--tokenizer", "bpe:280", *QUICK]
    assert main(other) == 2
    assert "already holds checkpoints" in capsys.readouterr().err
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == before
    assert not list(tmp_path.glob(".oncelm/other*"))


def test_a_model_is_not_trained_on_the_tokens_of_another_tokenizer(book, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["train", book, "--out", str(out), "--steps", "1", "--tokenizer", "bpe:300", *QUICK]) == 0
    more = ["--out", str(tmp_path / "more"), "--model", str(out / "model"), "--steps", "1", *QUICK]
    assert main(["data", "prepare", book, "--out", str(tmp_path / "tokens"), "--tokenizer", "bytes"]) == 0
    for data, message in (
        ([book, "--tokenizer", "bytes"], "tokenizer 'bytes' has other tokens"),
        ([str(tmp_path / "tokens")], "was prepared with other tokens"),
    ):
        for options in ([], ["--dry-run"]):
            capsys.readouterr()
            assert main(["train", *data, *more, *options]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert str(out / "model") in error
            assert error.count("\n") == 1

    tokenizer = load_tokenizer(out / "model")
    tokenizer.eos_token = "<pad>"
    tokenizer.add_tokens(["<turn>"])
    tokenizer.save_pretrained(tmp_path / "extended")
    assert main(["train", book, *more, "--tokenizer", str(tmp_path / "extended")]) == 0


def test_memory_that_is_too_small_is_one_line(book, tmp_path, capsys, monkeypatch) -> None:
    def fit(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(Trainer, "train", fit)
    assert main(["train", book, "--out", str(tmp_path / "run"), *QUICK]) == 1
    error = capsys.readouterr().err
    assert error.startswith("oncelm: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "activation_checkpointing=true" in error
    assert error.count("\n") == 1


def test_a_stopped_run_goes_on_with_its_own_settings_and_tokenizer(book, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "run"
    batch = ReadAhead.batch

    def stop_in_step_2(self, step: int, batch_size: int, rows: slice | None = None):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, batch_size, rows)

    monkeypatch.setattr(ReadAhead, "batch", stop_in_step_2)
    command = ["train", book, "--out", str(out), "--steps", "4", "--tokenizer", "bpe:280", *QUICK]
    assert main(command) == 0
    assert "Stopped after step 2; go on with: oncelm train --out" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr("oncelm.data.tokenizers.train_bpe", None)  # the one in out/tokenizer is used
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert [step for step, _ in list_checkpoints(out / "checkpoints")] == [2, 4]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("other", ["bpe:270", "bytes"])
def test_a_run_that_made_its_tokenizer_is_not_resumed_with_another(book, tmp_path, capsys, other) -> None:
    out = tmp_path / "run"
    assert main(["train", book, "--out", str(out), "--steps", "1", "--tokenizer", "bpe:280", *QUICK]) == 0
    before = (out / "config.yaml").read_bytes()
    for options in ([], ["--dry-run"]):
        assert main(["train", "--out", str(out), "--resume", "--steps", "2", "--tokenizer", other, *options]) == 2
        assert f"tokenizer '{other}' is not that of the run in" in capsys.readouterr().err
    assert (out / "config.yaml").read_bytes() == before
    assert main(["train", "--out", str(out), "--resume", "--steps", "2"]) == 0


def test_a_run_that_has_settings_of_before_goes_on(book, tmp_path, caplog) -> None:
    out = tmp_path / "run"
    assert main(["train", book, "--out", str(out), "--steps", "1", *QUICK, "decay_fraction=0.3"]) == 0
    for file in (out / "config.yaml", out / "checkpoints" / "step-000001" / "trainer.json"):
        text = file.read_text().replace("decay_fraction", "decay_share").replace("context_parallel", "chunk_parallel")
        file.write_text(text)
    manifest = out / "checkpoints" / "step-000001" / "manifest.json"
    files = json.loads(manifest.read_text())
    files["files"]["trainer.json"] = checksums(manifest.parent)["trainer.json"]
    manifest.write_text(json.dumps(files))
    assert main(["train", "--out", str(out), "--resume", "--steps", "2"]) == 0
    assert "decay_share is now called decay_fraction" in caplog.text
    assert "with another" not in caplog.text
    assert "decay_fraction: 0.3" in (out / "config.yaml").read_text()


def test_a_run_that_is_resumed_on_changed_text_says_so(book, tmp_path, caplog) -> None:
    out = str(tmp_path / "run")
    assert main(["train", book, "--out", out, "--steps", "1", *QUICK]) == 0
    assert main(["train", "--out", out, "--resume", "--steps", "2"]) == 0
    assert "on other data" not in caplog.text
    with Path(book).open("a") as text:
        text.write("One more line.\n")
    assert main(["train", "--out", out, "--resume", "--steps", "3"]) == 0
    assert f"on other data: {book!r} has changed" in caplog.text


def test_a_run_that_is_resumed_on_changed_conversations_says_so(tmp_path, caplog) -> None:
    chats, out = tmp_path / "chats.jsonl", str(tmp_path / "run")
    lines = [json.dumps({"prompt": f"{i}?", "answer": f"It is {i}."}) + "\n" for i in range(8)]
    chats.write_text("".join(lines))
    sft = ["--set", "task=sft", "seq_len=64", "batch_size=2"]
    assert main(["train", str(chats), "--out", out, "--steps", "1", *QUICK, *sft]) == 0
    assert main(["train", "--out", out, "--resume", "--steps", "2"]) == 0
    assert "on other data" not in caplog.text
    chats.write_text("".join(lines[:-1]) + json.dumps({"prompt": "7?", "answer": "It is 8."}) + "\n")
    assert main(["train", "--out", out, "--resume", "--steps", "3"]) == 0
    assert f"on other data: {str(chats)!r} has changed" in caplog.text


def test_a_digest_of_conversations_sees_what_is_learned_and_where_one_ends() -> None:
    def chat(*lengths: int, first: bool) -> list[Conversation]:
        made = [Conversation(np.zeros(n, np.uint32), np.ones(n, bool), "a.jsonl:1") for n in lengths]
        made[0].answer[0] = first
        return made

    chats = [chat(4, 2, first=True), chat(4, 2, first=False), chat(2, 4, first=True), chat(6, first=True)]
    assert len(set(map(digest_conversations, chats))) == len(chats)
    assert digest_conversations(chat(4, 2, first=True)) == digest_conversations(chats[0])


def test_a_dry_run_prints_and_writes_nothing(book, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["train", book, "--out", str(out), "--steps", "5", "--dry-run", *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "seq_len: 16" in shown
    parameters = oncelm.models.build_model("yoco-tiny", vocab_size=260).num_parameters()
    assert f"parameters       {parameters:,} (" in shown
    assert "without embeddings)" in shown
    assert "with checkpointing)" in shown
    assert "tokens per step  32" in shown
    assert "steps            5 (160 tokens)" in shown
    assert not out.exists()


def test_a_run_without_out_is_named_after_its_data(book, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", book, "--dry-run"]) == 0
    assert "out: runs/book\n" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert main(["train", book, "--steps", "1", *QUICK]) == 0
    assert Path("runs/book/model").is_dir()
    assert main(["train", book, "--steps", "1", *QUICK]) == 2
    assert "out 'runs/book' already holds checkpoints; resume that run" in capsys.readouterr().err
    assert main(["train", book, "--resume", "--steps", "2"]) == 0  # with its own settings
    assert "seq_len: 16" in Path("runs/book/config.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "sequence_length=8"], "unknown setting 'sequence_length'"),
        (["--set", "seq_len=100000"], "use seq_len of at most"),
        (["--config", "nowhere.yaml"], "recipe 'nowhere.yaml' (--config) cannot be read: No such file or directory;"),
        (["--config", "."], "recipe '.' (--config) cannot be read: Is a directory; give a YAML file"),
        (["--out", __file__], f"out {__file__!r} cannot be a folder: {__file__!r} is a file"),
        (["--out", f"{__file__}/run", "--dry-run"], f"cannot be a folder: {__file__!r} is a file"),
        (["--model", "lama-tiny"], "did you mean 'llama-tiny'"),
        (["--dry-run", "--processes", "3", "--set", "batch_size=8"], "do not divide among 3 processes"),
        (["--set", "model_overrides.vocab_size=50"], "knows 50 tokens only"),
    ],
)
def test_mistakes_are_one_line_and_status_2(book, tmp_path, capsys, options, message) -> None:
    assert main(["train", book, "--out", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_diverged_run_is_status_1(book, tmp_path, capsys) -> None:
    diverge = [*QUICK, "lr=1e30", "grad_clip=null"]
    assert main(["train", book, "--out", str(tmp_path / "run"), "--steps", "9", *diverge]) == 1
    assert "training stopped" in capsys.readouterr().err


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "oncelm train book.txt --out runs/book" in capsys.readouterr().out


def test_a_llama_preset_trains(book, tmp_path) -> None:
    out = tmp_path / "run"
    shape = ["model_overrides.num_hidden_layers=1", "model_overrides.hidden_size=32"]
    assert main(["train", book, "--out", str(out), "--model", "llama-tiny", "--steps", "1", *QUICK, *shape]) == 0
    assert oncelm.models.load(out / "model").config.model_type == "llama"


def test_conversations_are_learned(tmp_path, capsys) -> None:
    chats, out = tmp_path / "chats.jsonl", tmp_path / "run"
    lines = [{"prompt": f"{i} and one?", "response": f"{i + 1}."} for i in range(40)]
    chats.write_text("\n".join(map(json.dumps, lines)))
    options = ["--set", "task=sft", "seq_len=64", "batch_size=4", "log_every=1", "lr=5e-3", "warmup_steps=1"]
    command = ["train", str(chats), "--out", str(out), "--steps", "12", *options]
    assert main([*command, "--dry-run"]) == 0
    assert "conversations, 1 file(s)" in capsys.readouterr().out
    assert main(command) == 0
    losses = [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").open()) if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert (
        main([*command[:2], "--out", str(tmp_path / "other"), "--model", "llama-tiny", "--steps", "1", *options]) == 2
    )
    assert 'task "sft" needs a model that takes cu_seqlens' in capsys.readouterr().err
    chats.write_text("{}")
    assert main([*command[:2], "--out", str(tmp_path / "third"), *options]) == 2
    assert "chats.jsonl:1: neither messages nor" in capsys.readouterr().err
