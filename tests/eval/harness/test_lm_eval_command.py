"""lm-eval's own command finds OnceLM's models, and its figures are those of HFLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("peft")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry

import oncelm_lm_eval
from oncelm import load_tokenizer
from oncelm.cli import main
from oncelm.eval.harness.adapter import OnceLM
from tests.models.small import make_long, make_model

ROOT = Path(__file__).parents[3]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_loss": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{query}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_text": {
        "output_type": "generate_until", "doc_to_text": "{{query}}", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture
def model_folder(tmp_path) -> Path:
    make_model("retention", vocab_size=260, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Three tasks of eight questions, from a file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {"query": f"What is {a} and {a}?", "choices": [str(a), str(2 * a), "a lot"], "gold": a % 3} for a in range(8)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "questions.jsonl")}}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # YAML too
    return folder


@pytest.fixture
def installed(tmp_path) -> dict[str, str]:
    """An environment in which this source tree is installed, as far as its entry points tell."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    place = tmp_path / "site" / f"oncelm-{project['version']}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: oncelm\nVersion: {project['version']}\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in groups.items()]
    (place / "entry_points.txt").write_text("\n".join(lines))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join([str(place.parent), str(ROOT / "src")])}


def evaluate(command: list[str], model: str, folder: Path, tasks: Path, env: dict[str, str]) -> dict:
    """The figures of each task that the command writes."""
    out = tasks.parent / f"out-{model}"
    arguments = ["--model", model, "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--output_path", str(out)]
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.slow
def test_the_command_by_itself_equals_hflm_with_oncelm_imported(model_folder, tasks, installed) -> None:
    tools = Path(sys.executable).parent
    mine = evaluate([str(tools / "lm_eval")], "oncelm", model_folder, tasks, installed)
    theirs = evaluate([str(tools / "oncelm"), "run", "lm_eval"], "hf", model_folder, tasks, installed)
    assert mine.keys() == theirs.keys() == TASKS.keys()
    figures = 0
    for name in TASKS:
        for metric, expected in theirs[name].items():
            if isinstance(expected, float):
                assert mine[name][metric] == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, metric)
                figures += 1
    assert figures > 5


def test_arguments_as_lm_eval_gives_them(model_folder) -> None:
    made = get_model("oncelm").create_from_arg_string(
        f"pretrained={model_folder},dtype=float32,max_length=300", {"batch_size": 1, "device": "cpu"}
    )
    assert isinstance(made, OnceLM)
    assert made.max_length == 300
    again = OnceLM.create_from_arg_obj({"pretrained": str(model_folder), "dtype": "bfloat16", "batch_size": 8}, None)
    assert again.model.model.dtype == torch.bfloat16
    assert again.max_length == 512
    assert again.tokenizer_name


def test_a_longllama_with_its_memory_elsewhere(tmp_path) -> None:
    make_long(vocab_size=260).save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    request = Instance(
        "loglikelihood", {}, arguments=("A long context of words. " * 3, " so"), idx=0, metadata=("t", 0, 1)
    )
    found = []
    for extra in ("", ",memory=cpu", ",memory=cpu,last_context_length=6"):
        lm = OnceLM.create_from_arg_string(f"pretrained={tmp_path}{extra}", {"device": "cpu"})
        found.append(lm.loglikelihood([request], disable_tqdm=True)[0][0])
    assert found == pytest.approx([found[0]] * 3, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "needs a model: --model_args pretrained=DIR"),
        ("pretraned=x", "unknown argument of --model oncelm 'pretraned'; did you mean 'pretrained'"),
        ("pretrained={0},memory=cpu", "memory is for LongLLaMA models"),
        ("pretrained={0},max_length=0", "max_length must be a whole number of at least 1"),
        ("pretrained={0},mem_layers=1", "mem_layers"),
        ("pretrained={0},mem_layers=1;2", "mem_layers must be a list"),
        ("pretrained={0}/nowhere", "no model folder at"),
    ],
)
def test_arguments_that_are_refused(arguments, message, model_folder) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        OnceLM.create_from_arg_string(arguments.format(model_folder), {"device": "cpu"})


def test_autoload_touches_nothing_but_lm_evals_registry(monkeypatch) -> None:
    """torch calls it in every process, whatever else is there."""
    oncelm_lm_eval.autoload()
    oncelm_lm_eval.autoload()
    assert "oncelm" in model_registry
    assert "hf" in model_registry
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    oncelm_lm_eval.autoload()
    monkeypatch.delitem(sys.modules, "lm_eval")
    before = set(sys.modules)
    oncelm_lm_eval.autoload()
    assert set(sys.modules) == before


def test_run_calls_another_packages_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["oncelm"])
    with pytest.raises(SystemExit):
        main(["run", "lm-eval", "--help"])
    assert "lm" in capsys.readouterr().out
    assert main(["run", "lm_evil"]) == 2
    assert "has a command 'lm_evil'; did you mean 'lm_eval'?" in capsys.readouterr().err
