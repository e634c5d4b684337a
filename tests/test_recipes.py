"""Every recipe is a run that could start; the comparison and the length extension run in small."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oncelm.cli import main
from oncelm.data import tokenizers
from oncelm.models import build_model
from oncelm.models.yoco.presets import PRESETS
from oncelm.train.config import TrainConfig
from tests.models.test_longllama import make_llama

RECIPES = Path(__file__).parent.parent / "recipes"
SIZES = ("160m", "400m", "830m", "1.4b", "2.7b", "6.8b", "13b")


@pytest.fixture
def book(tmp_path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking.\n" * 200)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """cl100k_base takes seconds to build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "load_tokenizer", functools.cache(tokenizers.load_tokenizer))
        yield


def dry_run(capsys, book: str, recipe: Path, *options: str) -> str:
    assert main(["train", book, "--out", "unused", "--config", str(recipe), "--dry-run", *options]) == 0
    return capsys.readouterr().out


def windows(size: str) -> list[str]:
    heads = PRESETS[f"yoco-{size}"]["num_attention_heads"]
    return ["--set", "model_overrides.self_decoder=sliding_window", f"model_overrides.num_self_heads={heads}"]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_the_scaling_study(capsys, book, size: str) -> None:
    recipe = RECIPES / "scaling" / f"{size}.yaml"
    for options in ([], windows(size), ["--model", f"llama-{size}"]):
        shown = dry_run(capsys, book, recipe, *options)
        assert "tokens per step  262,144" in shown
        assert "steps            40,000 (10,485,760,000 tokens)" in shown
        if options:  # the comments name the same options
            assert all(option in recipe.read_text() for option in options if option != "--set")


def test_the_3b_run(capsys, book) -> None:
    shown = dry_run(capsys, book, RECIPES / "yoco-3b.yaml", "--processes", "64")
    assert "(2,829,133,824 without embeddings)" in shown
    assert "tokens per step  4,194,304" in shown
    config = TrainConfig.from_yaml(RECIPES / "yoco-3b.yaml", data="a", out="b")
    assert config.end_lr_ratio == pytest.approx(0.04)
    assert config.schedule_steps * config.tokens_per_step == pytest.approx(5e12, rel=1e-6)


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_every_recipe_is_valid(capsys, book, recipe: Path, tmp_path) -> None:
    options = []
    if recipe.parent.name == "length-extension":
        build_model("yoco-tiny", vocab_size=260).save_pretrained(tmp_path / "model")
    elif recipe.parent.name == "longllama":
        make_llama(vocab_size=260, num_hidden_layers=30).save_pretrained(tmp_path / "model")
    if (tmp_path / "model").exists():
        tokenizers.load_tokenizer("bytes").save_pretrained(tmp_path / "model")
        options = ["--model", str(tmp_path / "model")]
    shown = dry_run(capsys, book, recipe, *options)
    if recipe.parent.name == "length-extension":
        assert "tokens per step  4,194,304" in shown
    elif recipe.parent.name == "longllama":
        assert "(positives, negatives) (0,0) (1,1) (2,1) (3,0)" in shown
        assert f"tokens per step  {262_144 if recipe.stem == '3b' else 32_768:,}" in shown


SMALL = ["device=cpu", "dtype=float32", "compile=false", "seq_len=32", "batch_size=2", "grad_accumulation=1", "steps=2"]


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RECIPES.parent / "src"), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.slow
def test_the_stages_of_length_extension_follow_each_other(book, tmp_path) -> None:
    build_model("yoco-tiny", vocab_size=260).save_pretrained(tmp_path / "model")
    tokenizers.load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    script, out = RECIPES / "length-extension" / "run.sh", tmp_path / "out"
    settings = [*SMALL, "long_documents=null", "validation_fraction=0"]
    command = [str(script), book, str(tmp_path / "model"), str(out), "--set", *settings]
    variables = environment() | {"TRAIN": f"{sys.executable} -m oncelm train", "STAGES": "64k 1m"}
    subprocess.run(command, env=variables, check=True, capture_output=True)
    config = json.loads((out / "1m" / "model" / "config.json").read_text())
    assert config["rope_theta"] == 80_000_000
    assert f"model: {out / '64k' / 'model'}" in (out / "1m" / "config.yaml").read_text()
    again = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    assert again.stdout == f"Finished: {out / '1m' / 'model'}\n"


def test_a_stage_that_was_stopped_behind_an_export_is_not_the_next_ones_start(tmp_path) -> None:
    train, out = tmp_path / "train.sh", tmp_path / "out"
    train.write_text('mkdir -p "$5/model"\n')  # DATA --model MODEL --out OUT: an export, then SIGTERM, status 0
    command = ["sh", str(RECIPES / "length-extension" / "run.sh"), "data", "model", str(out)]
    done = subprocess.run(command, env=os.environ | {"TRAIN": f"sh {train}"}, check=True, capture_output=True)
    assert [stage.name for stage in out.iterdir()] == ["64k"]
    assert done.stdout == b""


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "compare"))
    import run

    yield run
    del sys.modules["run"]


def test_the_compared_models_are_of_equal_size(compare) -> None:
    sizes = []
    for preset, shape in compare.SHAPES.values():
        with torch.device("meta"):
            model = build_model(preset, **shape)
        sizes.append(model.num_parameters() - model.get_input_embeddings().weight.numel())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert min(sizes) > 30e6
    assert max(sizes) < 1.05 * min(sizes)


@pytest.mark.slow
def test_the_comparison_runs_stops_and_goes_on(compare, book, tmp_path, monkeypatch, capsys) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compare, "SHAPES", {"llama": ("llama-tiny", {}), "yoco-gret": ("yoco-tiny", {})})
    out = tmp_path / "out"
    settings = ["--set", *SMALL, "tokenizer=bytes", "log_every=1", "eval_every=1"]
    compare.main([book, str(out), "--seconds", "0", *settings])
    assert "not finished: llama, yoco-gret" in capsys.readouterr().out
    compare.main([book, str(out), *settings])
    assert "Llama                    held-out loss" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "summary.jsonl").read_text().splitlines()]
    assert [(line["tokens"], line["finished"]) for line in lines] == [(128, True)] * 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_ranks_beside_one(book, tmp_path) -> None:
    script, out = RECIPES / "many_gpus.py", tmp_path / "out"
    tiny = ["device=cpu", "dtype=float32", "model=yoco-tiny", "seq_len=32", "batch_size=2", "steps=4"]
    tiny += ["model_overrides.num_self_heads=2", "model_overrides.vocab_size=512"]
    command = [sys.executable, str(script), book, str(out), "--only", "one", "data", "resumed", "--set", *tiny]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "ranks.jsonl").read_text().splitlines()]
    assert [(record["run"], record["processes"]) for record in records] == [("one", 1), ("data", 2), ("resumed", 1)]
    assert all(len(record["losses"]) == 4 for record in records)
    assert all(record["difference"] < 1e-4 for record in records[1:])
    failing = [*command[:5], "one", "--set", *tiny, "seq_len=1"]
    done = subprocess.run(failing, env=environment(), capture_output=True, text=True)
    assert "failed" in done.stdout
    assert "seq_len must be a whole number of at least 2" in done.stdout


@pytest.mark.slow
def test_the_evidence_of_longllama_is_gathered_and_goes_on(book, tmp_path, monkeypatch, capfd) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(RECIPES / "longllama"))
    import evidence

    model, out = tmp_path / "model", tmp_path / "out"
    make_llama(vocab_size=260, num_hidden_layers=24, hidden_size=16).save_pretrained(model)
    tokenizers.load_tokenizer("bytes").save_pretrained(model)
    small = [
        "dtype=float32",
        "seq_len=64",
        "crossbatch_rows=4",
        "batch_size=8",
        "min_tokens=100",
        "steps=2",
        "eval_batches=1",
    ]
    small += ["model_overrides.max_position_embeddings=128", "model_overrides.last_context_length=64"]
    command = [str(model), book, str(out), "--trials", "1", "--contexts", "300", "--device", "cpu"]
    command += ["--lengths", "500", "--plain-lengths", "450", "--facts-tokens", "20K"]
    command += ["--bench-lengths", "256", "--knn-length", "600", "--set", *small]
    assert evidence.main([*command, "--only", "passkey"]) == 1  # there is nothing to ask yet
    assert "the same command tries them again" in capfd.readouterr().err
    assert evidence.main(command) == 0
    assert {path.stem for path in out.glob("*.done")} == {step.__name__ for step in evidence.STEPS}
    assert json.loads((out / "trained" / "model" / "config.json").read_text())["cross_batch_range"] == 63
    asked = ("passkey-untrained", "passkey-llama", "passkey-trained", "passkey-facts")
    for name in (*asked, "context-nll-trained", "context-nll-facts"):
        assert '"kind": "end"' in (out / f"{name}.jsonl").read_text()
    focus = [json.loads(line) for line in (out / "focus.jsonl").read_text().splitlines()]
    assert [line["model"] for line in focus] == ["untrained", "trained"]
    assert all(0 < share < 1 for line in focus for share in line["share"].values())
    exact, cpu = [json.loads(line) for line in (out / "knn.jsonl").read_text().splitlines()][:2]
    assert cpu["kl_to_exact"] == pytest.approx(exact["kl_to_exact"], abs=1e-6)
    for name in ("prefill", "decode"):
        subjects = [json.loads(line)["subject"] for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert subjects == ["LongLLaMA", "Llama"]
    assert (out / "report.html").exists()
    capfd.readouterr()
    assert evidence.main(command) == 0
    assert capfd.readouterr().out == ""
