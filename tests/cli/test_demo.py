"""`oncelm demo` from end to end, small; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oncelm.cli import main


@pytest.mark.slow
def test_small_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--train-seconds", "4", "--lengths", "64,128", "--max-document-tokens", "600", "--new-tokens", "5"]
    assert main(["demo", *arguments, "--out", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    assert "loss on held-out text" in shown
    assert "600 tokens in" in shown
    rows = json.loads((tmp_path / "demo" / "comparison.json").read_text())["rows"]
    assert [(row["length"], row["model"]) for row in rows] == [
        (64, "YOCO"), (64, "Llama"), (128, "YOCO"), (128, "Llama"),
    ]  # fmt: skip
    assert all(row["cache_bytes"] > 0 and row["prefill_seconds"] > 0 for row in rows)
    assert (tmp_path / "demo" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    # what it trained is a model like any other
    assert (
        main(["generate", "--model", str(tmp_path / "demo/yoco/model"), "--prompt", "My", "--max-new-tokens", "3"]) == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "many"], "--lengths 'many': each of them must be a whole number"),
        (["--lengths", "1,64"], "--lengths must be at least 2 tokens"),
        (["--document", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_refused(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["demo", *arguments, "--out", str(tmp_path / "demo")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
