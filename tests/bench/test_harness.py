"""`oncelm bench harness`: both score the same questions; where they disagree, nothing is timed."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oncelm.bench import GateError, read_records
from oncelm.bench.harness import compare
from oncelm.cli import main

MODEL = ["--hidden-size", "64", "--layers", "2", "--tokenizer", "bytes", "--device", "cpu", "--repeats", "2"]


@pytest.fixture
def data(tmp_path) -> str:
    questions = [
        {"query": f"Question: What is {a} and {a}?\nAnswer:", "choices": [str(a), str(2 * a), "much"], "gold": a % 3}
        for a in range(6)
    ]
    for split in ("train", "test"):
        file = tmp_path / "data" / "arc_easy" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return str(tmp_path / "data")


def harness(data: str, *more: str) -> int:
    return main(["bench", "harness", *MODEL, "--data", data, "--tasks", "arc_easy", "--fewshot", "1", *more])


def test_records_and_a_table(data, tmp_path, capsys) -> None:
    pytest.importorskip("lm_eval")
    out = tmp_path / "r.jsonl"
    assert harness(data, "--questions", "2", "--hflm-batch-size", "3", "--out", str(out)) == 0
    assert "HFLM" in capsys.readouterr().out
    ours, theirs = read_records(out)
    assert (ours["subject"], theirs["subject"]) == ("OnceLM", "HFLM")
    for record in (ours, theirs):
        assert record["benchmark"] == "harness"
        assert (record["task"], record["requests"], record["questions"], record["fewshot"]) == ("arc_easy", 6, 2, 1)
        assert len(record["runs"]) == len(record["cpu_runs"]) == record["repeats"] == 2
        assert record["seconds"] > 0
        assert record["gate_errors"]["largest_difference"] < 1e-4
        assert record["environment"]["torch"] == torch.__version__
    assert theirs["settings"] == {"batch_size": 3}


def test_any_causal_model(data, tmp_path) -> None:
    pytest.importorskip("lm_eval")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder, out = tmp_path / "llama", tmp_path / "r.jsonl"
    LlamaForCausalLM(LlamaConfig(vocab_size=260, **shape)).save_pretrained(folder)
    options = ["--model", str(folder), "--tokenizer", "bytes", "--device", "cpu", "--data", data, "--tasks", "arc_easy"]
    assert main(["bench", "harness", *options, "--fewshot", "1", "--questions", "2", "--out", str(out)]) == 0
    assert [record["model"]["type"] for record in read_records(out)] == ["llama", "llama"]


def test_a_wrong_scorer_is_not_timed(data, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("lm_eval")
    from oncelm.eval.harness import adapter

    scores = adapter.score_requests
    monkeypatch.setattr(
        adapter, "score_requests", lambda *arguments: [(value - 1e-3, flag) for value, flag in scores(*arguments)]
    )
    out = tmp_path / "r.jsonl"
    assert harness(data, "--questions", "2", "--out", str(out)) == 1
    assert "disagree on arc_easy" in capsys.readouterr().err
    assert out.read_text() == ""


def test_what_counts_as_the_same() -> None:
    ours = [(-100.0, True), (-50.0, False)]
    assert compare("t", ours, ours, torch.float32)["largest_difference"] == 0
    close = [(-101.0, False), (-50.0, False)]
    assert compare("t", ours, close, torch.bfloat16)["greedy_differences"] == 1
    for other in (close, [(-100.0, False), ours[1]], [(float("nan"), True), ours[1]]):
        with pytest.raises(GateError, match="nothing is measured"):
            compare("t", ours, other, torch.float32)
    with pytest.raises(GateError):
        compare("t", ours, [(-120.0, True), (-50.0, False)], torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["harness"], "--data DIR"),
        (["harness", "--data", "nowhere", "--tokenizer", "bytes"], "no folder of tasks at nowhere"),
        (["harness", "--data", "x", "--lengths", "9"], "--lengths does not go with `oncelm bench harness`"),
        (["prefill", "--data", "x"], "--data does not go with `oncelm bench prefill`"),
        (["needle", "--tokenizer", "bytes", "--no-peer"], "--no-peer does not go with `oncelm bench needle`"),
        (["needle"], "name one, such as --tokenizer"),
        (["needle", *MODEL, "--lengths", "0"], "above 0, such as 20"),
        (["ops", "--strict"], "--strict does not go with `oncelm bench ops, which has no model`"),
    ],
)
def test_bad_options_teach(arguments, message, capsys) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
