"""`oncelm bench serve` from the command line to the file and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oncelm.bench import read_records
from oncelm.cli import main
from tests.bench.serve.openai_server import Server


def test_an_address_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("KEY", "secret")
    out, plot, saved = (tmp_path / name for name in ("r.jsonl", "p.svg", "w.jsonl"))
    server = Server()
    workload = "chat:conversations=3,turns=2,system=6,input=4-8,output=2-3,think=0.01,rate=100"
    with server.running() as url:
        command = ["bench", "serve", "--url", url, "--out", str(out), "--api-key-env", "KEY"]
        assert main([*command, "--workload", workload, "--plot", str(plot), "--save-workload", str(saved)]) == 0
        assert "TTFT" in capsys.readouterr().out
        assert main([*command, "--workload", str(saved), "--model", "another", "--vocab-size", "20"]) == 0
    assert "Bearer secret" in server.headers[1]
    drawn, replayed = read_records(out)
    assert (drawn["model"], replayed["model"]) == ("a model", "another")
    assert drawn["requests"] == replayed["requests"] == 6
    assert drawn["output_tokens"] == replayed["output_tokens"] == sum(body["max_tokens"] for body in server.bodies[1:7])
    assert max(max(body["prompt"]) for body in server.bodies[7:]) < 20 < max(server.bodies[1]["prompt"])
    assert drawn["environment"]["python"]
    assert "secret" not in out.read_text()
    assert "</svg>" in plot.read_text()
    assert len(saved.read_text().splitlines()) == 3


def test_a_server_that_refuses_all_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("aiohttp")
    with Server(behave=lambda body: "refuse").running() as url:
        assert main(["bench", "serve", "--url", url]) == 2
    assert "does not complete a prompt: HTTP 400" in capsys.readouterr().err
    lengths = tmp_path / "w.jsonl"
    lengths.write_text(json.dumps({"input": 9, "output": 8}) + "\n")
    with Server(behave=lambda body: "refuse" if body["max_tokens"] == 8 else "well").running() as url:
        assert main(["bench", "serve", "--url", url, "--workload", str(lengths)]) == 1
    assert "1 x HTTP 400" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to measure: --model NAME for the engine, or --url URL"),
        (["--url", "127.0.0.1:8000"], "--url must be such as http://127.0.0.1:8000"),
        (["--url", "http://127.0.0.1:9", "--dtype", "bfloat16"], "--dtype does not go with --url"),
        (["--model", "yoco-tiny", "--timeout", "3"], "--timeout does not go with --model"),
        (["--url", "http://127.0.0.1:9", "--workload", "unifrom"], "did you mean 'uniform'"),
        (["--url", "http://127.0.0.1:9", "--workload", "no/such.jsonl"], "unknown workload 'no/such.jsonl'"),
        (["--url", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH"], "there is no such environment variable"),
        (["--url", "http://127.0.0.1:9", "--plot", "a.jpg"], "unknown format of a plot 'jpg'"),
        (["--url", "http://127.0.0.1:9", "--vocab-size", "0"], "--vocab-size must be"),
    ],
)
def test_bad_options_teach(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_serve_comes_first(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--out", "x", "serve"]) == 2
    assert "oncelm bench serve ..." in capsys.readouterr().err


def test_the_engine_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "r.jsonl"
    workload = "documents:documents=2,document=200-300,questions=4,input=4,output=3,rate=50"
    model = ["--model", "yoco-tiny", "--set", "vocab_size=97", "hidden_size=64", "--device", "cpu"]
    engine = ["--engine", "max_model_len=512", "page_size=16", "verbose=false", "kv_cache_bytes=20000000"]
    assert main(["bench", "serve", *model, *engine, "--workload", workload, "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # captions are as wide as their table
    assert "queue time" in shown
    assert "in the prefix cache" in shown
    (record,) = read_records(out)
    assert (record["subject"], record["model"], record["requests"], record["failed"]) == ("engine", "yoco-tiny", 8, 0)
    assert record["output_tokens"] == 24
    assert record["cached_tokens"] > 0
    assert record["gate_errors"]["logprobs"] < 1e-4
    assert record["settings"]["max_model_len"] == 512
    assert record["metrics"]["gauges"]["pages_total"] > 0
    assert record["peak_bytes"] > 0
    assert main(["bench", "serve", *model, "--engine", "page_sise=16"]) == 2
    assert "did you mean 'page_size'" in capsys.readouterr().err


def test_text_needs_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "w.jsonl").write_text('{"input": "Once", "output": 3, "turns": [{"input": "?", "output": 2}]}\n')
    command = ["bench", "serve", "--model", "yoco-tiny", "--set", "vocab_size=384", "--device", "cpu"]
    command += ["--workload", str(tmp_path / "w.jsonl"), "--engine", "kv_cache_bytes=20000000", "verbose=false"]
    assert main(command) == 2
    assert "name one, such as --tokenizer bytes" in capsys.readouterr().err
    assert main([*command, "--tokenizer", "bytes"]) == 0
    assert "5 output tokens" in " ".join(capsys.readouterr().out.split())


def test_an_engine_that_is_wrong_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from oncelm.engine.runner import Runner

    decode = Runner.decode
    monkeypatch.setattr(Runner, "decode", lambda self, rows: decode(self, rows).roll(1, -1))
    model = ["--model", "yoco-tiny", "--set", "vocab_size=97", "hidden_size=64", "--device", "cpu"]
    assert main(["bench", "serve", *model, "--engine", "verbose=false", "kv_cache_bytes=20000000"]) == 1
    assert "nothing is measured" in capsys.readouterr().err
