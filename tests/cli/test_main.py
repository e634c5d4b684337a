"""The command itself: verbs, exit statuses, help."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

import oncelm
from oncelm.cli import VERBS, main


def test_no_verb_lists_them(capsys) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"{verb} " in shown and summary in shown for verb, summary in VERBS.items())


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{oncelm.__version__}\n" == f"{version('oncelm')}\n"


def test_an_unknown_verb_suggests_the_nearest(capsys) -> None:
    assert main(["genrate", "--model", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("oncelm: error: unknown verb 'genrate'; did you mean 'generate'?")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_teaches_with_examples(verb, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert f"oncelm {verb}" in shown


@pytest.mark.parametrize("arguments", [["generate"], ["convert", "a"], ["info", "a", "b"], ["info", "--nope"]])
def test_wrong_options_are_status_2(arguments, capsys) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert f"oncelm {arguments[0]}" in shown
    assert shown.count("\n") == 1


def test_a_wrong_option_suggests_the_nearest(capsys) -> None:
    assert main(["generate", "--model", "x", "--promt", "y"]) == 2
    assert "did you mean '--prompt'" in capsys.readouterr().err
    assert main(["--nope"]) == 2


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (ValueError("no such thing"), 2, "oncelm: error: no such thing\n"),
        (FileNotFoundError("no model folder at x."), 2, "oncelm: error: no model folder at x.\n"),
        (MemoryError("no room for the model"), 2, "oncelm: error: no room for the model\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "oncelm: error: CUDA out of memory.\n"),
        (KeyboardInterrupt(), 130, "oncelm: interrupted\n"),
    ],
)
def test_exit_status(raised, status, line, monkeypatch, capsys) -> None:
    def run(args) -> int:
        raise raised

    monkeypatch.setattr("oncelm.cli.info.run", run)
    assert main(["info"]) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("value", "shown"), [(None, False), ("0", False), ("1", True)])
def test_a_developer_can_ask_for_the_traceback(value, shown, monkeypatch, capsys) -> None:
    def run(args) -> int:
        for _ in zip([1], [], strict=True):
            pass
        return 0

    monkeypatch.setattr("oncelm.cli.info.run", run)
    if value is not None:
        monkeypatch.setenv("ONCELM_TRACEBACK", value)
    assert main(["info"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("oncelm: error: zip() argument 2 is shorter than argument 1\n")
    assert ("Traceback" in error, "in run\n" in error) == (shown, shown)
    assert main([]) == 0
    assert "ONCELM_TRACEBACK=1" in capsys.readouterr().out


def test_other_errors_are_not_hidden(monkeypatch) -> None:
    def run(args) -> int:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("oncelm.cli.info.run", run)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["info"])
