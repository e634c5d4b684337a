"""How command lines are read: values that begin with a dash, options before what they are about, nearest names."""

from __future__ import annotations

import argparse

import pytest

from oncelm.cli import VERBS, Parser, main
from oncelm.cli.eval import REPORT, command


def parsed(*arguments: str) -> argparse.Namespace:
    parser = Parser(prog="oncelm test")
    parser.add_argument("where", nargs="?")
    parser.add_argument("--prompt")
    parser.add_argument("--prompt-file")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--strict", action=argparse.BooleanOptionalAction)
    return parser.parse(list(arguments))


@pytest.mark.parametrize(
    "value",
    ["--- Chapter 1 ---", "---", "--x", "-x", "- item", "-", "-1", "--nope=1", "--promptly yours", "-h", "a=b", ""],
)
def test_any_text_is_a_value(value) -> None:
    if value != "-h":
        assert parsed("--prompt", value).prompt == value
    assert parsed(f"--prompt={value}").prompt == value
    assert parsed(f"--prompt={value}", "x").where == "x"


def test_an_option_is_no_value() -> None:
    for arguments in (["--prompt", "--seed", "1"], ["--prompt", "--prompt-file", "x"], ["--set", "--seed", "1"]):
        with pytest.raises(ValueError, match=f"argument {arguments[0]}: expected"):
            parsed(*arguments)
    for arguments in (["--prompt", "--"], ["--prompt=--"], ["--seed", "--", "1"]):
        with pytest.raises(ValueError, match=r"argument --.*: "):
            parsed(*arguments)
    with pytest.raises(ValueError, match="given as --option=VALUE"):
        parsed("--prompt", "-h")


def test_abbreviations_and_numbers() -> None:
    assert parsed("--see=-3", "--strict", "x").seed == -3
    assert parsed("--see", "-3").seed == -3
    assert parsed("--prompt-f", "--x").prompt_file == "--x"
    with pytest.raises(ValueError, match="ambiguous option: --s"):
        parsed("--s", "x")


def test_options_before_what_they_are_about() -> None:
    for arguments in (
        ["--set", "a=1", "b=2", "place"],
        ["--set", "a=1", "--set", "b=2", "place"],
        ["place", "--set", "a=1", "b=2"],
        ["--set=a=1", "--set", "b=2", "--", "place"],
    ):
        assert vars(parsed(*arguments)) == vars(parsed("place", "--set", "a=1", "b=2"))
    assert parsed("--strict", "--", "--place").where == "--place"
    assert parsed("--set", "a").set == ["a"]


def test_a_misspelt_option_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown option of oncelm test '--promt'; did you mean '--prompt'"):
        parsed("--seed", "1", "--promt", "x")
    with pytest.raises(ValueError, match="did you mean '--seed'"):
        parsed("--sed=1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--limit", "3", "needle", "M"], "needle"),
        (["--limit=3", "needle", "M"], "needle"),
        (["--lim", "3", "needle", "M"], "needle"),
        (["--compile", "needle", "M"], "needle"),
        (["--strict", "--lengths", "4K", "--seed", "-1", "needle", "M"], "needle"),
        (["--tokenizer", "ruler", "needle", "M"], "needle"),
        (["needle", "M", "--limit", "3"], "needle"),
        (["--no-strict", "--out", "nll", "--", "needle", "M"], "needle"),
    ],
)
def test_options_before_the_task(arguments, named) -> None:
    assert command(arguments).description.startswith(f"{named}: ")


def test_options_before_a_report() -> None:
    assert command(["--out", "page.html", "--title", "mine", "report", "a.jsonl"]).description == REPORT


def test_a_wrong_option_before_the_task_is_named(capsys) -> None:
    assert main(["eval", "--lenghts", "4K", "needle", "M"]) == 2
    assert "did you mean '--lengths'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_no_command_line_ends_in_a_traceback(verb, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    nonsense = ["--", "-", "---", "--x=", "=", "", "-1", "\u00e9", "\ud800", "--set", "--model", "--out", "/dev/null/x"]
    for first in nonsense if verb != "demo" else ():
        for rest in ([], ["--"], ["x"], ["--out", "-"], ["--model", ""]):
            try:
                status = main([verb, first, *rest])
            except SystemExit as stopped:  # --help
                status = stopped.code
            captured = capsys.readouterr()
            assert status in (0, 2)
            assert status == 0 or captured.err.count("\n") == 1


def test_an_option_of_before_names_its_new_one() -> None:
    with pytest.raises(ValueError, match="option '--gemm' is now called '--quantization'"):
        parsed("--gemm", "float8")
