"""Passkey: the prompt that was asked for, exact scoring, and a run that can be stopped anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm import load_tokenizer
from oncelm.cli import main
from oncelm.data.tokenizers import train_bpe
from oncelm.eval import Example, Reader, evaluate, passkey
from oncelm.eval.report import accuracy_by_length
from tests.models.small import make_long, make_model

BYTES = load_tokenizer("bytes")
BPE = train_bpe([passkey.prompt(5000, 0.5, "12345")] * 3, 400)


@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(500, 3000),
    depth=st.none() | st.sampled_from([0, 33.3, 100]),
    trial=st.integers(0, 5),
    bpe=st.booleans(),
)
def test_a_prompt_is_as_long_as_asked_with_the_key_at_its_depth(length, depth, trial, bpe) -> None:
    tokenizer = BPE if bpe else BYTES
    asked = passkey.example(tokenizer, length, depth, 7, trial)
    assert length - 8 <= len(asked.ids) <= length
    assert asked == passkey.example(tokenizer, length, depth, 7, trial)
    text = tokenizer.decode(asked.ids)
    needle = passkey.NEEDLE.format(key=asked.answer)
    assert text.startswith(passkey.DESCRIPTION)
    assert text.endswith(passkey.QUESTION)
    assert text.count(needle) == 1
    if depth is not None:
        filler = len(text) - len(needle) - len(passkey.DESCRIPTION) - len(passkey.QUESTION) - 4
        place = text.index(needle) - len(passkey.DESCRIPTION) - 2
        assert abs(place - filler * depth / 100) <= 1
    assert asked.max_new_tokens > len(tokenizer(" " + asked.answer).input_ids)


def test_trials_differ() -> None:
    many = list(passkey.examples(BYTES, [400, 500], trials=10))
    assert len(many) == 20
    assert len({example.answer for example in many}) > 15
    assert len({json.dumps(example.key) for example in many}) == 20
    assert [e.ids for e in passkey.examples(BYTES, [500], trials=3)] == [e.ids for e in many[10:13]]


@pytest.mark.parametrize(
    ("output", "correct"),
    [
        (" 123. Remember", True),
        ("123", True),
        ("\n123 is", True),
        (" 1234", False),
        (" 12", False),
        ("a 123", False),
        ("", False),
    ],
)
def test_exact_answers(output, correct) -> None:
    assert passkey.score(Example({}, [], "123", 1), output) is correct


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"a passkey prompt has at least .* tokens, asked for 30"):
        list(passkey.examples(BYTES, [30]))
    with pytest.raises(ValueError, match="depths are percents from 0 to 100, got 101"):
        list(passkey.examples(BYTES, [500], [101]))
    with pytest.raises(ValueError, match="trials must be at least 1"):
        list(passkey.examples(BYTES, [500], trials=0))


# -- running ----------------------------------------------------------------------------------------------------------


class Copier(Reader):
    """Answers from the prompt itself: right, but for every third question."""

    asked = 0

    def answer(self, example: Example) -> str:
        Copier.asked += 1
        return " 0" if example.key["trial"] % 3 == 2 else f" {example.answer}."


def run(file: Path, trials: int, **settings: object) -> list[dict]:
    Copier.asked = 0
    reader = Copier(None, BYTES)  # type: ignore[arg-type]
    return list(evaluate(reader, passkey.examples(BYTES, [400, 500], trials=trials), passkey.score, settings, file))


def test_a_run_goes_on_where_it_stopped(tmp_path) -> None:
    file = tmp_path / "out" / "results.jsonl"
    whole = run(tmp_path / "whole.jsonl", 6, model="a")
    assert accuracy_by_length(whole) == {400: (4, 6), 500: (4, 6)}
    first = run(file, 3, model="a")
    assert Copier.asked == 6
    text = file.read_text()
    file.write_text(text + text.splitlines()[0][:40])  # a crash in the middle of a line
    again = run(file, 6, model="a")
    assert Copier.asked == 6
    assert [line["key"] for line in again] == [line["key"] for line in whole]
    assert again[:3] == first[:3]
    assert len(file.read_text().splitlines()) == 12
    with pytest.raises(ValueError, match="results of another run: model was different"):
        run(file, 6, model="b")
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1, is no result"):
        run(file, 6, model="a")


@pytest.mark.parametrize("kind", ["long", "yoco"])
def test_the_reader_writes_what_the_model_does(kind) -> None:
    model = make_long(vocab_size=260, eos_token_id=None) if kind == "long" else make_model("retention", vocab_size=260)
    asked = Example({}, BYTES("Call me Ishmael. " * 4).input_ids, "", 6)
    ids = torch.tensor([asked.ids])
    cache = model.new_cache(1)
    model.prefill(ids[:, :-1], cache)
    step, written = ids[:, -1:], []
    for _ in range(6):
        step = model(step, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        written.append(step.item())
    assert Reader(model, BYTES).answer(asked) == BYTES.decode(written, skip_special_tokens=True)


def test_the_command(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    folder, out = tmp_path / "model", tmp_path / "results.jsonl"
    make_long(vocab_size=260).save_pretrained(folder)
    BYTES.save_pretrained(folder)
    command = ["eval", "passkey", str(folder), "--lengths", "400,450", "--trials", "2", "--out", str(out)]
    assert main([*command, "--plot", str(tmp_path / "plot.png"), "--memory", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "400 tokens  0.000  (0 of 2)" in shown
    assert "450 tokens  0.000  (0 of 2)" in shown
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4
    assert lines[0]["settings"]["memory"] == "cpu"
    assert str(tmp_path) not in out.read_text()
    for arguments, message in (
        ([*command[:3], "--lengths", "30", "--out", str(out)], "at least"),
        ([*command, "--memory", "knn"], "memory was different"),
        (["eval", "passkye", *command[2:]], "did you mean 'passkey'"),
        ([*command, "--depths", "half"], "as in 0,50,100; got 'half'"),
        ([*command, "--depths", "120"], "from 0 to 100, got 120"),
        ([*command[:-1], str(tmp_path)], "is a folder; name a .jsonl file"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error, error
