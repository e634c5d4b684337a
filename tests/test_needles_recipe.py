"""The needles recipe: rows that fit a sequence, answers before their questions, other names than the evaluation's."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from oncelm.data.dataset import TokenDataset
from oncelm.data.tokenizers import load_tokenizer
from oncelm.data.tokens import open_tokens
from oncelm.eval.tasks.cities import CITIES
from oncelm.train.config import TrainConfig

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
    for name in ("build", "drills", "rows", "facts", "run"):
        sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. {TEXT}" for i in range(300)))
    return str(path)


def build(text: str, data: Path, *options: str) -> Path:
    import build

    amounts = [f"{LENGTH}:{60 * LENGTH}"]
    build.main([text, str(data), "--drill", "--tokens", *amounts, "--tokenizer", "bytes", "--workers", "1", *options])
    return data / str(LENGTH)


def rows_of(folder: Path) -> list[str]:
    """The rows as the trainer cuts them, without their last token, as text."""
    source = open_tokens(folder).train
    dataset = TokenDataset(source, seq_len=LENGTH, seed=0, validation_fraction=0)
    tokenizer = load_tokenizer(folder / "tokenizer")
    batches = dataset.batch(0, 60).tokens
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


def test_sentences_can_be_left_out(recipe, text, tmp_path) -> None:
    with_all = "".join(rows_of(build(text, tmp_path / "all")))
    without = "".join(rows_of(build(text, tmp_path / "some", "--leave-out", "pass key")))
    assert with_all.count("pass key") > 10
    assert "pass key" not in without
    assert "was given the code" in without
    with pytest.raises(ValueError, match=r"'\{' leaves none of the sentences"):
        build(text, tmp_path / "none", "--leave-out", "{")


@pytest.mark.parametrize("length", [64, 256])
def test_drills_tell_a_few_facts_again_in_other_orders(recipe, text, tmp_path, length) -> None:
    import build as module

    data = tmp_path / "data"
    amount = f"{length}:{100 * length}"
    module.main([text, str(data), "--drill", amount, "--tokens", "--tokenizer", "bytes", "--workers", "1"])
    source = open_tokens(data / f"drill-{length}").train
    rows = TokenDataset(source, seq_len=length, seed=0, validation_fraction=0).batch(0, 90).tokens.tolist()
    known = []
    for row in rows:
        assert row[length - 2] == EOS
        told = row[: length - 2]
        assert EOS not in told
        fours = [tuple(told[i : i + 4]) for i in range(len(told) - 3)]
        half = len(fours) // 2
        known.append(np.mean([four in fours[: half + i] for i, four in enumerate(fours[half:])]))
        assert known[-1] > 0.4  # where one fact ends and another begins, there is something new
    assert np.mean(known) < 0.95  # not simply the same again
    assert len({tuple(row) for row in rows}) == len(rows)


def test_keys_in_a_drill_differ_and_share_tokens(recipe) -> None:
    import drills

    tokenizer = load_tokenizer("bytes")
    for number in range(20):
        row = drills.Drills(tokenizer, 1024, 0).row(number)[:-1]
        assert len(row) == 1022
        assert len(set(row.tolist())) <= drills.SYMBOLS + drills.MOST_PHRASE
    with pytest.raises(ValueError, match="at least 64 tokens, got 32"):
        drills.Drills(tokenizer, 32, 0)
    with pytest.raises(ValueError, match="half of the keys there are: 65536 tokens, got 262144"):
        drills.Drills(tokenizer, 1 << 18, 0)


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
    from facts import draw_fact, other_forms

    from oncelm.eval.tasks.needle import NEEDLE, QUESTION

    facts = [draw_fact("Orvana", other_forms(), np.random.default_rng(seed)) for seed in range(200)]
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
    shard = next(f for f in made if f.suffix == ".json")
    for damage in (Path.unlink, lambda file: os.truncate(file, 7)):
        times = {f.name: f.stat().st_mtime_ns for f in made}
        damage(shard)
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
    options = ("--drill", "--tokenizer", "bytes", "--workers", "1")
    with pytest.raises(ValueError, match="choose another folder"):
        module.main([text, str(tmp_path / "a"), "--tokens", "512:5K", "--tokenizer", "cl100k_base"])
    with pytest.raises(ValueError, match="rows must have at least 128 tokens, got 16"):
        module.main([text, str(tmp_path / "a"), "--tokens", "16:5K", *options])
    with pytest.raises(ValueError, match="not enough for one row of 1048576; give more text"):
        module.main([text, str(tmp_path / "a"), "--tokens", "1024K:5M", *options])


def commands(text: str, out: Path, *options: str) -> list[tuple[str, ...]]:
    import run

    seen: list[tuple[str, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Step, "do", lambda step: seen.append(step.command))
        run.main([text, str(out), *options])
    return seen


def test_the_run_measures_what_it_trains(recipe, text, tmp_path) -> None:
    import run

    out, count = tmp_path / "out", len(run.STAGES)
    seconds = list(map(str, range(10, 10 + count)))
    build_, *stages = commands(text, out, "--seconds", *seconds, "--held-out", text)
    trained, evals = stages[:count], stages[count:]
    assert [command[3] for command in stages] == ["train"] * count + ["eval"] * 5
    built = " ".join(build_)
    before = None
    for (stage, (kind, length, *_)), command, limit in zip(run.STAGES.items(), trained, seconds, strict=True):
        config = TrainConfig.from_yaml(option(command, "--config"), settings_of(command), data=command[4], out="out")
        rows = f"drill-{length}" if kind == "drill" else str(length)
        assert command[4] == str(out / "data" / rows)
        assert option(command, "--out") == str(out / stage)
        assert config.seq_len == config.model_overrides["max_position_embeddings"] == length  # whole rows
        assert f" {length}:" in built[built.index("--drill" if kind == "drill" else "--tokens") :]
        assert (config.steps, config.max_seconds) == (None, float(limit))
        assert (config.target_loss is not None) == (kind == "drill")
        if before is not None:
            assert option(command, "--model") == str(out / before / "model")
        before = stage
    assert option(evals[0], "needle") == str(out / before / "model")
    assert "1024,2048,4096,8192,16384,32768,65536,131072" in evals[0]


def option(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def settings_of(command: tuple[str, ...]) -> tuple[str, ...]:
    return command[command.index("--set") + 1 :]


def test_a_drill_ends_where_only_a_reader_who_looks_back_gets(recipe) -> None:
    import run
    from drills import KEY, SYMBOLS, VALUE

    for kind, length, _, target in run.STAGES.values():
        if kind != "drill":
            continue
        facts = length // 32
        symbols = 512 if facts == 2 else SYMBOLS
        first_round = facts * (KEY + sum(VALUE) / 2) * math.log(symbols) / length  # the least: symbols are known
        assert 1.2 * first_round < target < math.log(symbols)


def test_a_stopped_build_leaves_no_worker(recipe, text, tmp_path) -> None:
    options = ("--drill", "--tokens", "16384:200M", "--plain-share", "0.9", "--tokenizer", "bytes", "--workers", "2")

    def start() -> None:
        os.setsid()
        sys.argv = ["build.py", text, str(tmp_path / "data"), *options]
        runpy.run_path(str(RECIPE / "build.py"), run_name="__main__")

    build = multiprocessing.get_context("fork").Process(target=start)
    build.start()
    while not list(tmp_path.glob("data/16384/shards/*.json")):
        assert build.is_alive()
        time.sleep(0.01)
    build.terminate()
    build.join()
    with pytest.raises(ProcessLookupError):
        os.killpg(build.pid, signal.SIGKILL)  # ends them, should there be any
    assert build.exitcode == 143


SAVES_WHEN_STOPPED = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
pathlib.Path("started").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_what_a_stage_saves(tmp_path, number) -> None:
    (tmp_path / "stage.py").write_text(SAVES_WHEN_STOPPED)
    code = "import run, sys; run.Step((sys.executable, 'stage.py')).do(); open('next', 'w')"
    paths = os.pathsep.join([str(RECIPE), environment()["PYTHONPATH"]])
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "started").exists():
        assert run.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # as a terminal does
    else:
        run.send_signal(number)
    assert "the same command goes on" in run.communicate()[1]
    assert run.returncode == 1
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "next").exists()


@pytest.mark.slow
def test_the_run_ends_in_a_report(text, tmp_path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(RECIPE / "run.py"),
        text,
        str(out),
        *("--rows", "64", "128", "256", "256", "512"),
        *("--tokens", "20K", "20K", "20K", "20K", "20K"),
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


@pytest.mark.slow
def test_questions_all_at_once_and_one_by_one(tmp_path) -> None:
    import oncelm

    oncelm.build_model("yoco-tiny", vocab_size=260).save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    script = RECIPE.parents[1] / "benchmarks" / "needles_engine.py"
    options = ["--length", "600", "--haystacks", "2", "--needles", "3", "--device", "cpu", "--out", "results.jsonl"]
    command = [sys.executable, str(script), "model", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["equal_answers"] == line["questions"] == 6
    assert line["hits"] == 4
