"""The command itself: verbs, exit statuses, help."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import torch

import oncelm
from oncelm import load_tokenizer
from oncelm.cli import VERBS, main
from tests.models.small import make_model


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


# -- output and places ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def encoded(encoding: str, errors: str = "strict") -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Standard output and error in another encoding."""
    out, err = io.BytesIO(), io.BytesIO()
    with (
        io.TextIOWrapper(out, encoding, errors) as out_text,
        io.TextIOWrapper(err, encoding, errors) as err_text,
        contextlib.redirect_stdout(out_text),
        contextlib.redirect_stderr(err_text),
    ):
        yield out, err


def test_output_in_ascii(tmp_path) -> None:
    """A text, a table and an error print whole where the encoding lacks characters of theirs."""
    folder = tmp_path / "m\u00fc\u65e5"
    make_model("retention", vocab_size=260, max_position_embeddings=256, eos_token_id=None).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    (tmp_path / "t\u00e9\u65e5.txt").write_text("caf\u00e9 \u65e5\u672c\n" * 200, encoding="utf-8")
    beyond = ("--beyond-trained-length",)
    text, tokens = str(tmp_path / "t\u00e9\u65e5.txt"), str(tmp_path / "\u65e5")
    for arguments in (
        ["info", str(folder)],
        ["generate", "--model", str(folder), "--prompt", "\u65e5\u672c", "--max-new-tokens", "5", "--device", "cpu"],
        ["data", "prepare", text, "--out", tokens],
        ["data", "info", tokens],
        ["data", "sample", tokens, "--seq-len", "32"],
        [
            "eval",
            "nll",
            str(folder),
            "--documents",
            text,
            "--limit",
            "1",
            *beyond,
            "--out",
            str(folder / "\u65e5.jsonl"),
        ],
        ["eval", "report", str(folder / "\u65e5.jsonl"), "--out", str(folder / "\u65e5.html")],
        ["train", text, "--out", str(tmp_path / "\u65e5run"), "--dry-run"],
    ):
        with encoded("ascii") as (_, err):
            status = main(arguments)
            assert status == 0, (arguments, err.getvalue())
    for encoding, errors in (("ascii", "strict"), ("ascii", "surrogateescape"), ("latin-1", "strict")):
        with encoded(encoding, errors) as (out, err):
            assert main(["info", str(folder)]) == 0
            assert main(["info", str(tmp_path / "\u65e5 nowhere")]) == 2
            sys.stdout.flush()
            sys.stderr.flush()
            assert rb"\u65e5" in out.getvalue()
            assert rb"\u65e5 nowhere" in err.getvalue()


def test_tables_in_a_pipe_are_whole(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = tmp_path / ("a_long_name_" * 8)
    make_model("retention", vocab_size=260).save_pretrained(folder)
    main(["info", str(folder)])
    assert folder.name in capsys.readouterr().out
    main(["info"])
    shown = capsys.readouterr().out
    assert "\u2026" not in shown
    assert max(map(len, shown.splitlines())) > 80
    monkeypatch.setenv("COLUMNS", "60")
    main(["info"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["eval", "needle", "MODEL", "--out", "PLACE"], "--out"),
        (["eval", "report", "MODEL", "--out", "PLACE"], "--out"),
        (["eval", "report", "MODEL", "--out", "page.html", "--png", "PLACE"], "--png"),
        (["bench", "decode", "--out", "PLACE"], "--out"),
        (["data", "prepare", "TEXT", "--out", "PLACE"], "--out"),
        (["data", "sample", "TEXT", "--out", "PLACE"], "--out"),
        (["demo", "--out", "PLACE"], "--out"),
        (["train", "TEXT", "--out", "PLACE"], "--out"),
        (["generate", "--model", "MODEL", "--prompt", "x", "--save-cache", "PLACE"], "--save-cache"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_with_its_option(arguments, option, tmp_path, capsys) -> None:
    """Before a model is read or anything is done: MODEL is not there at all."""
    (tmp_path / "file").write_text("text")
    places = {
        "PLACE": str(tmp_path / "file" / "below"),
        "TEXT": str(tmp_path / "file"),
        "MODEL": str(tmp_path / "none"),
    }
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert option in error
    assert "file is a file" in error or "is a file; choose another --out" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_read_only_folder_is_named_with_the_option_to_use(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a root user could write anywhere
    for arguments in (["eval", "needle", "none"], ["data", "prepare", "text.txt"], ["demo"], ["train", "text.txt"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "is read-only for this user; name another place with --out" in error, error
