"""TREC and WebQuestions: their public formats, prompts full of demonstrations, the judge."""

from __future__ import annotations

import json

import numpy as np
import pytest

from oncelm import load_tokenizer
from oncelm.eval import TASKS, Codec, Generate, make_task, run
from oncelm.eval.tasks.in_context import find_split

CLASSES = {"DESC:manner": "Description", "HUM:ind": "Human", "NUM:date": "Number"}


@pytest.fixture
def trec(tmp_path) -> str:
    folder = tmp_path / "trec"
    folder.mkdir()
    for name, count in (("train_5500.label", 40), ("TREC_10.label", 7)):
        lines = [f"{label} What is the caf\xe9 number {i} ?" for i in range(count) for label in CLASSES]
        (folder / name).write_bytes("\n".join(lines).encode("latin-1"))
    return str(folder)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(load_tokenizer("bytes"), 260)


def test_prompts_are_as_full_as_they_can_be(trec, codec) -> None:
    task = make_task(TASKS["trec"], data=trec, lengths=(400, 700), trials=2, questions=5)
    examples = list(task.examples(codec, 0))
    assert len(examples) == 20
    for example in examples:
        length, prompt = example.tags["context_length"], codec.decode(example.prompt)
        assert length - 60 < len(example.prompt) + example.max_new_tokens <= length
        *shown, asked = prompt.split("\n\n")
        assert len(shown) == example.tags["demonstrations"] == len(set(shown))
        assert all(s.partition("\nType: ")[2] in CLASSES.values() for s in shown)
        assert asked.startswith("Question: What is the caf\xe9 number ")
        assert asked.endswith("\nType:")
        assert example.target in CLASSES.values()
    by_trial = {(e.tags["context_length"], e.tags["trial"]): bytes(e.prompt[:300]) for e in examples}
    assert len(set(by_trial.values())) == 4
    again, other = ([bytes(e.prompt) for e in task.examples(codec, seed)] for seed in (0, 1))
    assert [bytes(e.prompt) for e in examples] == again != other


def test_fine_classes(trec, codec) -> None:
    task = make_task(TASKS["trec"], data=trec, fine=True, lengths=(400,), trials=1)
    assert {e.target for e in task.examples(codec, 0)} == {"Description: manner", "Human: ind", "Number: date"}


@pytest.mark.parametrize("form", ["own", "lines", "tabs"])
def test_webqs_forms(form, tmp_path, codec) -> None:
    items = [(f"who is number {i}?", [f"Padm\xe9 {i}", f"P. {i}"]) for i in range(30)]
    for split, part in (("train", items[:20]), ("test", items[20:])):
        if form == "own":
            listed = '(list (description "{}") (description {}))'
            content = json.dumps([{"utterance": q, "targetValue": listed.format(*a)} for q, a in part])
            (tmp_path / f"webquestions.examples.{split}.json").write_text(content)
        elif form == "lines":
            lines = "\n".join(json.dumps({"question": q, "answers": a}) for q, a in part)
            (tmp_path / f"{split}.jsonl").write_text(lines)
        else:
            (tmp_path / f"wq-{split}.tsv").write_text("\n".join(f"{q}\t{a}" for q, a in part))
    task = make_task(TASKS["webqs"], data=str(tmp_path), lengths=(500,), trials=1)
    examples = list(task.examples(codec, 0))
    assert sorted(e.target for e in examples) == sorted(" | ".join(a) for _, a in items[20:])
    assert all("Answer: Padm\xe9" in codec.decode(e.prompt) for e in examples)


def test_the_judge(trec) -> None:
    task = make_task(TASKS["webqs"], data=trec)
    example = Generate(np.zeros(1, np.int32), "The Beatles | John Lennon", 20)
    for output, right in ((" beatles.", 1), (" john  lennon", 1), (" Lennon", 0), ("", 0)):
        assert task.score(example, output) == {"correct": right}


def test_demonstrations_are_read_once(trec, tmp_path, language_models) -> None:
    task = make_task(TASKS["trec"], data=trec, lengths=(600,), trials=2, questions=8)
    done = run(task, language_models("retention"), tmp_path / "run.jsonl")
    samples = list(done.samples.values())
    assert sum(s["tokens_read"] for s in samples) < 0.3 * sum(s["prompt_tokens"] for s in samples)
    assert all("\n" not in s["output"] for s in samples)
    table, _ = TASKS["trec"].views([done])
    assert table.header == ["model", "600"]
    assert table.quoted == []  # nothing was published for this length


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (
            ".jsonl",
            '{"question": "a?", "answers": []}',
            r"line 2 of .*{split}\.jsonl: the answers must .* at least one",
        ),
        (".jsonl", '{"question": "a?", "answers": [" "]}', r"line 2 of .*{split}\.jsonl: the answers .* none empty"),
        (".jsonl", "a?\t3", r"line 2 of .*{split}\.jsonl: the answers must be texts, .* got 3"),
        (".jsonl", '{"question": 3, "answers": ["b"]}', r"line 2 of .*{split}\.jsonl: the question must be a text"),
        (".jsonl", "caf\xe9", r"{split}\.jsonl is not UTF-8 text"),
        (".json", '{"a":1}', r"{split}\.json must be a list of .*'a': 1"),
        (".json", '[{"a":1}]', r"entry 1 of .*{split}\.json is no .*KeyError\('utterance'\)"),
        (".json", '["a"]', r"entry 1 of .*{split}\.json is no .*utterance"),
        (".json", "[caf\xe9]", r"{split}\.json is not UTF-8 text"),
        (".json", "[", r"{split}\.json is not JSON"),
    ],
)
def test_damaged_webqs(suffix, content, message, split, tmp_path, codec) -> None:
    whole = '{"question": "b?", "answers": ["c"]}\n'
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(whole)
    (tmp_path / f"{split}.jsonl").unlink()
    text = whole + content if suffix == ".jsonl" else content
    (tmp_path / f"{split}{suffix}").write_bytes(text.encode("latin-1"))
    task = make_task(TASKS["webqs"], data=str(tmp_path), lengths=(500,), trials=1)
    with pytest.raises(ValueError, match=message.format(split=split)):
        list(task.examples(codec, 0))


def test_a_second_file_of_a_split_is_named(tmp_path, caplog) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        (tmp_path / name).touch()
    assert find_split(str(tmp_path), "train") == tmp_path / "train-0.jsonl"
    assert "left out, as one file is read: train-1.jsonl" in caplog.text
    caplog.clear()
    assert find_split(str(tmp_path), "test") == tmp_path / "test.jsonl"
    assert not caplog.text


def test_missing_or_odd_data(trec, tmp_path, codec) -> None:
    def examples(**options):
        return list(make_task(TASKS["trec"], **options).examples(codec, 0))

    with pytest.raises(ValueError, match="needs a folder of data: --data DIR"):
        examples()
    with pytest.raises(ValueError, match="has no train split: a file with 'train' in its name"):
        examples(data=str(tmp_path / "none"))
    (tmp_path / "train.label").write_text("DESC:manner How ?\nnothing\n")
    with pytest.raises(ValueError, match=r"has no test split: .* found: train\.label"):
        examples(data=str(tmp_path))
    (tmp_path / "test.label").write_text("DESC:manner How ?\n")
    with pytest.raises(ValueError, match=r"line 2 of .*train\.label is no 'CLASS:subclass question'"):
        examples(data=str(tmp_path))
    with pytest.raises(ValueError, match="90 tokens has no room for a demonstration"):
        examples(data=trec, lengths=(90,))
