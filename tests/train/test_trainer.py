"""The training loop: it learns, resumes exactly, stops when asked, and loses nothing that was saved."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM

from oncelm.data.read_ahead import ReadAhead
from oncelm.data.tokenizers import load_tokenizer
from oncelm.models import build_model
from oncelm.train.checkpoint import find_checkpoint, find_damage
from oncelm.train.trainer import Trainer


def logged(out: str, name: str) -> dict[int, float]:
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def at_step(monkeypatch):
    """Do something when the batch of a step is asked for."""
    batch = ReadAhead.batch

    def at_step(step: int, event) -> None:
        def asked(self, wanted: int, *rest):
            if wanted == step:
                event()
            return batch(self, wanted, *rest)

        monkeypatch.setattr(ReadAhead, "batch", asked)

    return at_step


def kill(number: signal.Signals):
    return lambda: os.kill(os.getpid(), number)


def test_it_learns_reports_and_exports(make_model, dataset, make_config) -> None:
    config = make_config(steps=40, log_every=10, grad_accumulation=2)
    tokenizer = load_tokenizer("bytes")
    result = Trainer(make_model(), dataset, config, tokenizer).train()
    assert (result.step, result.tokens, result.interrupted) == (40, 40 * 2 * 2 * 16, False)
    losses = logged(config.out, "loss")
    assert list(losses) == [10, 20, 30, 40]
    assert losses[40] == result.loss < losses[10]
    assert logged(config.out, "validation_loss")[40] == result.validation_loss
    assert logged(config.out, "lr")[40] < config.lr
    exported = AutoModelForCausalLM.from_pretrained(result.model_path)
    batch = next(dataset.validation_batches(2)).tokens
    assert torch.isfinite(exported(input_ids=batch, labels=batch).loss)
    assert load_tokenizer(result.model_path)("a")["input_ids"] == tokenizer("a")["input_ids"]


def test_documents_are_not_left_unmasked(make_model, dataset, make_config) -> None:
    with pytest.raises(ValueError, match="not of the data, which does not say where documents begin"):
        Trainer(make_model(), dataset, make_config(document_masking=True)).train()


def test_accumulation_is_one_larger_batch(make_model, dataset, make_config, tmp_path) -> None:
    ends = []
    for batch_size, grad_accumulation in ((4, 1), (1, 4)):
        model = make_model(attn_implementation="eager")
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        out = str(tmp_path / f"run{batch_size}")
        config = make_config(batch_size=batch_size, grad_accumulation=grad_accumulation, out=out)
        Trainer(model, dataset, config).train()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bitwise(
    make_model, dataset, make_config, tmp_path, at_step, number, tied
) -> None:
    whole, parts = make_config(out=str(tmp_path / "whole")), make_config(out=str(tmp_path / "parts"))
    expected = make_model(tie_word_embeddings=tied)
    Trainer(expected, dataset, whole).train()

    at_step(2, kill(number))
    stopped = Trainer(make_model(tie_word_embeddings=tied), dataset, parts).train()
    at_step(-1, None)
    assert (stopped.step, stopped.interrupted, stopped.model_path) == (3, True, None)
    assert find_checkpoint(Path(parts.out) / "checkpoints").name == "step-000003"

    torch.manual_seed(99)  # whatever state the new process is in
    resumed = make_model(tie_word_embeddings=tied)
    result = Trainer(resumed, dataset, make_config(out=parts.out, resume=True)).train()
    assert (result.step, result.interrupted) == (6, False)
    for name in ("loss", "lr", "grad_norm", "validation_loss"):
        assert logged(parts.out, name) == logged(whole.out, name)
    assert torch.equal(weights(resumed), weights(expected))


def test_signals_act_as_before_once_a_run_has_ended(make_model, dataset, make_config, at_step) -> None:
    at_step(1, kill(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    Trainer(make_model(), dataset, make_config()).train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_damaged_checkpoint_gives_way_to_the_one_before(make_model, dataset, make_config, tmp_path, caplog) -> None:
    whole = make_config()
    Trainer(make_model(), dataset, whole).train()
    losses, last = logged(whole.out, "loss"), Path(whole.out) / "checkpoints" / "step-000006"
    weights = last / "model-00001-of-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    Trainer(make_model(), dataset, make_config(resume=True)).train()
    assert "step-000006 is damaged (model-00001-of-00001.safetensors" in caplog.text
    assert logged(whole.out, "loss") == losses
    assert find_checkpoint(last.parent) == last  # written anew


def test_a_finished_run_resumes_to_nothing_and_a_longer_one_goes_on(make_model, dataset, make_config, at_step) -> None:
    Trainer(make_model(), dataset, make_config()).train()
    again = Trainer(make_model(), dataset, make_config(resume=True)).train()
    assert (again.step, again.loss) == (6, None)
    finished = Path(make_config().out, "finished")
    assert finished.exists()
    longer = make_config(resume=True, steps=9)
    at_step(7, kill(signal.SIGTERM))
    assert Trainer(make_model(), dataset, longer).train().step == 8
    assert not finished.exists()  # though the model of the shorter run is there
    assert Trainer(make_model(), dataset, longer).train().step == 9
    assert finished.exists()


def test_resume_starts_anew_where_nothing_was_saved(make_model, dataset, make_config) -> None:
    assert Trainer(make_model(), dataset, make_config(resume=True)).train().step == 6


def test_a_run_does_not_write_over_another(make_model, dataset, make_config) -> None:
    config = make_config()
    Trainer(make_model(), dataset, config).train()
    before = find_checkpoint(Path(config.out) / "checkpoints")
    with pytest.raises(ValueError, match=r"already holds checkpoints; resume that run"):
        Trainer(make_model(), dataset, config).train()
    assert find_checkpoint(before.parent) == before


def test_a_run_does_not_touch_what_another_is_writing(make_model, dataset, make_config) -> None:
    config = make_config()
    half_written = Path(config.out) / "checkpoints" / f".step-000002.{0:016x}.tmp"
    half_written.mkdir(parents=True)
    with (
        FileLock(Path(config.out) / ".lock"),
        pytest.raises(ValueError, match=r"out '.*run' is being written by another run"),
    ):
        Trainer(make_model(), dataset, make_config(resume=True)).train()
    assert half_written.exists()
    assert Trainer(make_model(), dataset, config).train().step == 6
    assert not half_written.exists()


def test_a_checkpoint_of_another_model_is_an_error(make_model, dataset, make_config) -> None:
    Trainer(make_model(), dataset, make_config()).train()
    settings = Path(make_config().out, "config.yaml")
    before = settings.read_text()
    with pytest.raises(ValueError, match="does not fit the model given"):
        Trainer(make_model(hidden_size=8), dataset, make_config(resume=True, lr=0.5)).train()
    assert settings.read_text() == before  # a plain --resume still goes on


def test_other_settings_on_resume_are_warned_of_and_used(make_model, dataset, make_config, caplog) -> None:
    Trainer(make_model(), dataset, make_config()).train()
    config = make_config(resume=True, steps=7, betas=(0.8, 0.9), lr=1e-3, schedule="constant")
    trainer = Trainer(make_model(), dataset, config)
    trainer.train()
    assert "another betas: [0.8, 0.9], was [0.9, 0.95]" in caplog.text
    assert trainer.optimizers[0].param_groups[0]["betas"] == (0.8, 0.9)
    assert logged(config.out, "lr")[7] == 1e-3


def test_only_known_data_that_differs_is_warned_of(make_model, dataset, make_config, caplog) -> None:
    for steps, digest in enumerate((None, "a", "a", None), start=1):  # the first as of an older version
        Trainer(make_model(), dataset, make_config(resume=True, steps=steps), data_digest=digest).train()
    assert "other data" not in caplog.text
    for steps, digest in ((5, "a"), (6, "b")):
        Trainer(make_model(), dataset, make_config(resume=True, steps=steps), data_digest=digest).train()
    assert caplog.text.count("on other data: 'unused' has changed") == 1


def test_a_nan_stops_the_run_and_keeps_the_last_checkpoint(make_model, dataset, make_config) -> None:
    model = make_model()
    forward = model.forward
    calls = 0

    def poisoned(**inputs):
        nonlocal calls
        calls += 1
        output = forward(**inputs)
        output.loss = output.loss * (float("nan") if calls == 4 else 1.0)
        return output

    model.forward = poisoned
    config = make_config(eval_every=None)
    with pytest.raises(FloatingPointError, match=r"^loss is nan at step 4; .*the last checkpoint is .*step-000002"):
        Trainer(model, dataset, config).train()
    assert torch.isfinite(weights(model)).all()
    assert find_checkpoint(Path(config.out) / "checkpoints").name == "step-000002"
    assert not (Path(config.out) / "model").exists()


@pytest.mark.parametrize("steps", [4, 5], ids=["where one is due", "elsewhere"])
def test_a_nan_in_the_last_validation_keeps_the_checkpoint_before(make_model, dataset, make_config, steps) -> None:
    model = make_model()
    forward = model.forward

    def poisoned(**inputs):
        output = forward(**inputs)
        output.loss = output.loss * (1.0 if model.training else float("nan"))
        return output

    model.forward = poisoned
    config = make_config(steps=steps, eval_every=None, keep_checkpoints=1)
    before = (steps - 1) // 2 * 2
    with pytest.raises(FloatingPointError, match=rf"validation loss is nan at step {steps}; .*step-00000{before}"):
        Trainer(model, dataset, config).train()
    assert [folder.name for folder in (Path(config.out) / "checkpoints").iterdir()] == [f"step-00000{before}"]


def test_a_full_disk_leaves_the_checkpoint_before(make_model, dataset, make_config, monkeypatch) -> None:
    config = make_config()
    write_data = HuggingFaceStorageWriter.write_data

    def full_at_step_4(self, plan, planner):
        if "step-000004" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(self, plan, planner)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full_at_step_4)
    with pytest.raises(OSError, match=r"cannot write .*step-000004.*No space left"):
        Trainer(make_model(), dataset, config).train()
    checkpoints = Path(config.out) / "checkpoints"
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert Trainer(make_model(), dataset, make_config(resume=True)).train().step == 6


def test_training_goes_on_while_a_checkpoint_is_written(make_model, dataset, make_config, monkeypatch, at_step) -> None:
    write_data, later = HuggingFaceStorageWriter.write_data, threading.Event()

    def slow_at_step_2(self, plan, planner):
        assert "step-000002" not in str(self.path) or later.wait(60)
        return write_data(self, plan, planner)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", slow_at_step_2)
    at_step(3, later.set)
    config = make_config(steps=4, keep_checkpoints=3)
    trained = make_model()
    Trainer(trained, dataset, config).train()
    first, last = (Path(config.out) / "checkpoints" / f"step-00000{step}" for step in (2, 4))
    assert find_damage(first) is None
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(last)), weights(trained))
    assert not torch.equal(weights(AutoModelForCausalLM.from_pretrained(first)), weights(trained))


def test_a_write_that_the_system_refuses_is_an_os_error(make_model, dataset, make_config) -> None:
    """torch.distributed.checkpoint raises errors of its own kind, which a command line would not catch."""
    trainer = Trainer(make_model(), dataset, make_config(steps=1))
    trainer.train()
    trainer.step = 2
    size = 4 * weights(trainer.model).numel()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size // 2, size + 4_000):  # the weights do not fit; they fit, the optimizer does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            trainer.save()
            with pytest.raises(OSError, match=r"cannot write .*step-000002"):
                trainer.saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [folder.name for folder in trainer.checkpoints.iterdir()] == ["step-000001"]
    assert trainer.save().name == "step-000002"
    trainer.saver.wait()
    assert find_checkpoint(trainer.checkpoints).name == "step-000002"


def test_time_ends_a_run_and_its_schedule(make_model, dataset, make_config) -> None:
    config = make_config(steps=None, max_seconds=0.5, save_every=None, eval_every=None)
    result = Trainer(make_model(), dataset, config).train()
    assert not result.interrupted
    assert 0.5 <= result.seconds < 5
    rates = list(logged(config.out, "lr").values())
    assert len(rates) > 4
    assert rates[-1] < 0.5 * config.lr


def test_a_run_ends_once_its_validation_loss_is_low_enough(make_model, dataset, make_config, tmp_path) -> None:
    whole = make_config(steps=20, eval_every=2, out=str(tmp_path / "whole"))
    Trainer(make_model(), dataset, whole).train()
    losses = logged(whole.out, "validation_loss")
    target = (losses[6] + losses[8]) / 2
    first = next(step for step, loss in losses.items() if loss <= target)
    assert first < 20
    options = {"steps": 20, "eval_every": 2, "target_loss": target}
    result = Trainer(make_model(), dataset, make_config(**options)).train()
    assert (result.step, result.interrupted) == (first, False)
    assert result.validation_loss == losses[first]
    assert result.model_path is not None
    metrics = Path(make_config().out, "metrics.jsonl")
    lines = metrics.read_text().splitlines()
    assert sum(f'"step": {first}, "validation_loss"' in line for line in lines) == 1

    shutil.rmtree(result.model_path)  # as where it was killed before the export: it is not trained further
    again = Trainer(make_model(), dataset, make_config(**options, resume=True)).train()
    assert (again.step, again.validation_loss, again.model_path) == (first, losses[first], result.model_path)
    assert metrics.read_text().splitlines() == lines


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_in_float32(make_model, dataset, make_config) -> None:
    model = make_model().to(torch.bfloat16)
    seen = set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    Trainer(model, dataset, make_config(dtype="bfloat16", steps=2)).train()
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_checkpoint_loads_as_a_model(make_model, dataset, make_config) -> None:
    model = make_model()
    folder = Trainer(model, dataset, make_config(steps=1)).train().model_path.parent / "checkpoints/step-000001"
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(folder)), weights(model))


def test_a_file_asks_for_an_export(make_model, dataset, make_config, monkeypatch) -> None:
    config = make_config(steps=4, save_every=None)
    request, model, finished = (Path(config.out) / name for name in ("export", "model", "finished"))
    seen = {}
    batch = ReadAhead.batch

    def asked(self, step, *rest):
        seen[step] = model.exists()
        assert not finished.exists()
        if step == 1:
            request.touch()
        return batch(self, step, *rest)

    monkeypatch.setattr(ReadAhead, "batch", asked)
    Trainer(make_model(), dataset, config).train()
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert not request.exists()
    assert finished.exists()
    assert [folder.name for folder in sorted((Path(config.out) / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]


def test_compile_is_for_any_model(make_model, dataset, make_config) -> None:
    yoco = build_model("yoco-tiny", vocab_size=32)
    llama = make_model()
    for model in (yoco, llama):
        Trainer(model, dataset, make_config())
    assert not yoco.compiles_layers
    assert not llama._compiled_call_impl
    for model in (yoco, llama):
        Trainer(model, dataset, make_config(compile=True))
    assert yoco.compiles_layers
    assert llama._compiled_call_impl
