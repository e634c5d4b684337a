"""The needles recipe: rows that fit a sequence, answers before their questions, other names than the evaluation's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oncelm.data.dataset import TokenDataset
from oncelm.data.tokenizers import load_tokenizer
from oncelm.data.tokens import open_tokens
from oncelm.eval.tasks.cities import CITIES
from oncelm.train.config import load_config

RECIPE = Path(__file__).parents[1] / "recipes" / "needles"
TEXT = "It was a bright cold day in April. Winston Smith slipped through the doors of Victory Mansions! Was it London? "
LENGTH = 512
EOS = 2


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(RECIPE.parents[1] / "src"), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def recipe(monkeypatch):
    """The folder of the recipe, importable."""
    monkeypatch.syspath_prepend(str(RECIPE))
    yield RECIPE
    for name in ("build", "rows", "facts", "run"):
        sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. {TEXT}" for i in range(300)))
    return str(path)


def build(text: str, data: Path, *options: str) -> Path:
    import build

    amounts = [f"{LENGTH}:{60 * LENGTH}"]
    build.main([text, str(data), "--tokens", *amounts, "--tokenizer", "bytes", "--workers", "1", *options])
    return data / str(LENGTH)


def rows_of(folder: Path) -> list[str]:
    """The rows as the trainer cuts them, without their last token, as text."""
    source = open_tokens(folder).train
    dataset = TokenDataset(source, seq_len=LENGTH, seed=0, validation_share=0)
    tokenizer = load_tokenizer(folder / "tokenizer")
    batches = dataset.batch(0, 60)
    for row in batches.tolist():
        assert row.count(EOS) == 1
        assert row[LENGTH - 2] == EOS  # then the first token of the next row
    return [tokenizer.decode(row[: LENGTH - 2]) for row in batches.tolist()]


ASKED = re.compile(r"magic (\S+(?: \S+)?) number\? The special magic \1 number is (\d+) \. ")


def test_a_row_is_a_sequence_with_every_answer_before_its_question(recipe, text, tmp_path) -> None:
    rows = rows_of(build(text, tmp_path / "data"))
    questions = 0
    for row in rows:
        for asked in ASKED.finditer(row):
            questions += 1
            assert f"The special magic {asked[1]} number is {asked[2]} . " in row[: asked.start()]
    assert questions > 20
    assert sum("?" not in row.replace("London?", "") for row in rows) < 20  # few are plain
    assert len({row[:100] for row in rows}) > 50


def test_short_rows_are_echoes(recipe, text, tmp_path) -> None:
    import build as module

    data = tmp_path / "data"
    module.main([text, str(data), "--tokens", "64:8K", "--tokenizer", "bytes", "--workers", "1"])
    rows = TokenDataset(open_tokens(data / "64").train, seq_len=64, seed=0, validation_share=0).batch(0, 100).tolist()
    for row in rows:
        assert row[62] == EOS
        assert any(row[62 - count : 62] == row[62 - 2 * count : 62 - count] for count in range(16, 32))


def test_no_city_of_the_evaluation_is_a_name(recipe) -> None:
    from facts import Names

    words = [word for city in CITIES for word in city.split()]
    names = Names([*words, *map(str.upper, words), "April", "Victory"])
    assert names.words == ["April", "Victory"]
    drawn = names.draw(2000, np.random.default_rng(0))
    assert len(set(drawn)) == 2000
    assert {"April", "Victory"} < set(drawn)
    held_out = {word.casefold() for word in words}
    assert not any(held_out & set(name.casefold().split()) for name in drawn)


def test_facts_are_asked_for_in_the_evaluations_words(recipe) -> None:
    from facts import draw_fact

    from oncelm.eval.tasks.needle import NEEDLE, QUESTION

    facts = [draw_fact("Orvana", np.random.default_rng(seed)) for seed in range(200)]
    alike = 0
    for fact in facts:
        number = re.findall(r"\d+", fact.needle)[-1]
        assert fact.question.endswith(f"{number} . ")
        if fact.needle == NEEDLE.format(city="Orvana", number=number):
            assert fact.question == f"{QUESTION.format(city='Orvana')}{number} . "
            alike += 1
    assert 70 < alike < 130


def test_the_same_command_gives_the_same_rows_and_mends_what_is_missing(recipe, text, tmp_path) -> None:
    first, second = build(text, tmp_path / "a"), build(text, tmp_path / "b")
    made = sorted((first / "shards").iterdir())
    assert [(f.name, f.read_bytes()) for f in made] == [
        (f.name, f.read_bytes()) for f in sorted((second / "shards").iterdir())
    ]
    times = {f.name: f.stat().st_mtime_ns for f in made}
    shard = next(f for f in made if f.suffix == ".json")
    shard.unlink()
    build(text, tmp_path / "a")
    assert {n for n, t in times.items() if (first / "shards" / n).stat().st_mtime_ns != t} == {
        f"{shard.stem}{suffix}" for suffix in (".json", ".tokens", ".documents")
    }
    other = build(text, tmp_path / "b", "--seed", "1")
    assert rows_of(other) != rows_of(first)


def test_errors_are_one_line(recipe, text, tmp_path, capsys) -> None:
    import build as module

    with pytest.raises(SystemExit):
        module.main([text, str(tmp_path / "a"), "--tokens", "512"])
    assert "'512' must be LENGTH:TOKENS" in capsys.readouterr().err
    build(text, tmp_path / "a")
    with pytest.raises(ValueError, match="choose another folder"):
        module.main([text, str(tmp_path / "a"), "--tokens", "512:5K", "--tokenizer", "cl100k_base"])
    with pytest.raises(ValueError, match="rows must have at least 32 tokens, got 16"):
        module.main([text, str(tmp_path / "a"), "--tokens", "16:5K", "--tokenizer", "bytes", "--workers", "1"])
    with pytest.raises(ValueError, match="not enough for one row of 1048576; give more text"):
        module.main([text, str(tmp_path / "a"), "--tokens", "1024K:5M", "--tokenizer", "bytes", "--workers", "1"])


def commands(text: str, out: Path, *options: str) -> list[tuple[str, ...]]:
    import run

    seen: list[tuple[str, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Step, "do", lambda step: seen.append(step.command))
        run.main([text, str(out), *options])
    return seen


def test_the_run_measures_what_it_trains(recipe, text, tmp_path) -> None:
    build_, drill, short, long, *evals, report = commands(
        text, tmp_path / "out", "--seconds", "30", "100", "90", "--held-out", text
    )
    assert [command[3] for command in (drill, short, long, *evals, report)] == ["train"] * 3 + ["eval"] * 6
    for stage, command in (("drill", drill), ("short", short), ("long", long)):
        recipe_file = command[command.index("--config") + 1]
        settings = command[command.index("--set") + 1 :]
        config = load_config(recipe_file, settings, {"data": command[4], "out": "out"})
        assert command[4] == str(tmp_path / "out" / "data" / str(config.seq_len))  # rows as long as the sequences
        assert config.model_overrides["max_position_embeddings"] == config.seq_len
        assert f"{config.seq_len}:" in " ".join(build_)
        assert (config.steps, config.max_seconds) == (None, {"drill": 30.0, "short": 100.0, "long": 90.0}[stage])
    assert long[long.index("--model") + 1] == str(tmp_path / "out" / "short" / "model")
    assert "1024,2048,4096,8192,16384,32768" in evals[0]
    assert "65536,131072" in evals[1]


@pytest.mark.slow
def test_the_run_ends_in_a_report(text, tmp_path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(RECIPE / "run.py"),
        text,
        str(out),
        "--rows",
        "32",
        "256",
        "512",
        "--tokens",
        "20K",
        "20K",
        "20K",
    ]
    command += ["--shortest", "512", "--build", "--tokenizer bytes --workers 1", "--eval", "--runs 1 --depths 2"]
    small = ["hidden_size=32", "intermediate_size=32", "num_self_decoder_layers=1", "num_cross_decoder_layers=1"]
    small += ["num_self_heads=1", "num_attention_heads=1", "num_key_value_heads=1"]
    settings = [f"model_overrides.{key}" for key in small] + ["device=cpu", "dtype=float32", "compile=false", "steps=2"]
    settings += ["batch_size=2", "save_every=null", "report=[]"]
    for _ in range(2):
        done = subprocess.run([*command, "--set", *settings], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert " train " not in done.stdout  # the second time nothing is trained
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    assert list((out / "figures").glob("*.png"))
