"""Command lines of every verb, with options, values and files that make little sense."""

from __future__ import annotations

import argparse
import importlib
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncelm.cli import VERBS, Parser, find_command, main
from oncelm.eval import TASKS
from oncelm.models.load import quiet_transformers
from tests.fuzz.guard import NUMBERS, WORDS, draws, guarded
from tests.models.small import make_long, make_model

pytestmark = pytest.mark.slow
FOLDER = Path(mkdtemp(prefix="fuzz-"))
# options whose larger values ask for much work, which is no mistake
LENGTHY = {"--max-new-tokens", "--steps", "--lengths", "--repeats", "--runs", "--depths", "--trials", "--new-tokens"}
LENGTHY |= {"--batch-size", "--count", "--seq-len", "--train-seconds", "--limit", "--samples", "--blocks", "--layers"}


@cache
def places() -> dict[str, str]:
    for name, model in (("yoco", make_model("retention", vocab_size=300)), ("long", make_long(vocab_size=300))):
        with quiet_transformers():
            model.save_pretrained(FOLDER / name)
    (FOLDER / "text.txt").write_text("the sea is deep\n" * 300)
    (FOLDER / "empty").mkdir()
    (FOLDER / "broken").mkdir()
    (FOLDER / "broken" / "config.json").write_text(json.dumps({"model_type": "oncelm_yoco", "hidden_size": 1e9}))
    return {name: str(FOLDER / name) for name in ("yoco", "long", "text.txt", "empty", "broken", "absent")}


def options_of(verb: str, arguments: list[str]) -> list[str]:
    module = importlib.import_module(f"oncelm.cli.{verb}")
    parser = Parser(prog=verb, formatter_class=argparse.RawDescriptionHelpFormatter)
    find_command(module, arguments).add_arguments(parser)
    return sorted(option for option in parser._option_string_actions if option.startswith("--") and option != "--help")


BEGINNINGS = {
    "generate": [["--model", "yoco", "--prompt", "a", "--tokenizer", "bytes", "--max-new-tokens", "2"],
                 ["--model", "long", "--prompt", "a", "--tokenizer", "bytes", "--max-new-tokens", "2"]],
    "cache": [["list", "--cache-dir", "store"], ["rm", "absent", "--cache-dir", "store"],
              ["load", "broken", "absent", "--cache-dir", "store"],
              ["save", "broken", "text.txt", "--cache-dir", "store"]],
    "info": [["yoco"], ["long"], ["broken"], []],
    "convert": [["yoco", "absent"], ["text.txt", "absent"], ["broken", "absent"]],
    "data": [["info", "text.txt"], ["sample", "text.txt", "--count", "1"], ["prepare", "empty"], ["sample", "yoco"]],
    "train": [["text.txt", "--dry-run", "--out", "absent"], ["text.txt", "--dry-run", "--model", "yoco"]],
    "eval": [["nll", "yoco", "--tokenizer", "bytes", "--documents", "text.txt", "--out", "absent/r.jsonl"],
             *([name, "broken", "--tokenizer", "bytes"] for name in TASKS), ["report", "text.txt"]],
    "bench": [["prefill", "--model", "broken"], ["memory", "--model", "broken"], ["harness"], ["nothing"]],
}  # fmt: skip
VALUES = st.sampled_from([*map(str, NUMBERS), *WORDS, "1K", "4,x", "bytes", "bpe:x", "cpu", "float32", "a=b", "lr=["])


# demo trains, run starts other programs
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("demo", "run")])
@draws(120)
@given(data=st.data())
def test_a_mistake_is_one_line_and_status_2(verb, data, monkeypatch_module, capfd) -> None:
    beginning = [places().get(word, word) for word in data.draw(st.sampled_from(BEGINNINGS[verb]))]
    known = options_of(verb, beginning)
    words = []
    for _ in range(data.draw(st.integers(0, 3))):
        option = data.draw(st.sampled_from(known) | st.text(alphabet="-abc", max_size=6))
        value = data.draw(st.sampled_from(["1", "2", "0", "-1", "x", "1.5"]) if option in LENGTHY else VALUES)
        value = places().get(value, value)
        words += data.draw(st.sampled_from([[option, value], [option], [f"{option}={value}"], [value]]))
    monkeypatch_module.chdir(FOLDER)
    capfd.readouterr()
    status: object = None
    with guarded():
        try:
            status = main([verb, *beginning, *words])
        except SystemExit as stopped:  # --help
            status = stopped.code
    assert status in (0, 2), (status, beginning, words)
    if status == 2:
        shown = capfd.readouterr().err.strip().splitlines()
        assert shown[-1].startswith("oncelm: error: "), shown
        assert not any(line.startswith("Traceback") for line in shown), shown


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch
