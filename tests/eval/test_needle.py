"""Needle prompts are what the protocol says, at any length; strict mode mends what it mends."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oncelm import load_tokenizer
from oncelm.eval import TASKS, Codec, Generate, make_task
from oncelm.eval.documents import Haystack
from oncelm.eval.tasks.cities import CITIES

FOUND = re.compile(r"The special magic ([A-Z][A-Za-z ]+?) number is (\d+) \. ")
ASKED = re.compile(r"\nWhat is the special magic (.+?) number\? The special magic \1 number is $")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(load_tokenizer("bytes"), 260)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("haystack") / "text.txt"
    file.write_text("".join(f"Sentence {i} says {i * i % 97} things. " for i in range(2000)))
    return str(file)


def prompts(codec, seed=0, task="needle", **options) -> list[tuple[Generate, str]]:
    made = make_task(TASKS[task], **options)
    examples = list(made.examples(codec, seed))
    assert len(examples) == made.count()
    return [(example, codec.decode(example.prompt)) for example in examples]


@settings(deadline=None, max_examples=20)
@given(st.integers(700, 3000), st.integers(1, 12), st.integers(1, 3), st.booleans(), st.integers(0, 5))
def test_one_needle(text, codec, length, depths, runs, strict, seed) -> None:
    options = {"lengths": (length,), "depths": depths, "runs": runs, "haystack": text, "strict": strict}
    for example, prompt in prompts(codec, seed, **options):
        assert len(example.prompt) + example.max_new_tokens == length
        (city, number), asked = *FOUND.findall(prompt), ASKED.search(prompt)
        assert (city, number) == (asked[1], example.target)
        assert 1 <= int(number) <= 50_000
        place, room = FOUND.search(prompt).start(), len(FOUND.sub("", prompt)) - len(asked[0])
        depth = min(np.linspace(0, 100, depths) if depths > 1 else [50], key=lambda d: abs(d - example.tags["depth"]))
        wanted = room * depth / 100
        assert wanted - 60 < place <= wanted + 1  # moved back to the end of a sentence
        assert place in (0, room) or prompt[:place].rstrip().endswith(".")
    if depths > 1:
        assert {e.tags["depth"] for e, _ in prompts(codec, seed, **options)} >= {0.0, 100.0}


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 8), st.booleans(), st.integers(0, 5))
def test_many_needles(text, codec, count, strict, seed) -> None:
    options = {"lengths": (1500,), "needles": (count,), "runs": 2, "haystack": text, "strict": strict}
    for example, prompt in prompts(codec, seed, "multi-needle", **options):
        found, asked = FOUND.findall(prompt), ASKED.search(prompt)[1]
        assert len(found) == count
        assert (asked, example.target) in found
        if strict:
            assert len({city for city, _ in found}) == count
        assert len(example.prompt) + example.max_new_tokens == 1500


def test_the_other_needles_stay_where_they_are(text, codec) -> None:
    options = {"lengths": (3000,), "needles": (4,), "runs": 1, "haystack": text, "strict": True}
    others = []
    for example, prompt in prompts(codec, 0, "multi-needle", **options):
        others.append([(c, n) for c, n in FOUND.findall(prompt) if n != example.target])
    assert all(sorted(row) == sorted(others[0]) for row in others)
    shared = [
        len(_common(a.prompt, b.prompt))
        for (a, _), (b, _) in zip(*[prompts(codec, 0, "multi-needle", **options)[i:] for i in (0, 1)], strict=False)
    ]
    assert shared[-1] > 2000  # the deeper the needle, the more of the text before it is the same


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return a[: different[0] if len(different) else length]


def test_strict_runs_never_show_a_sentence_twice(text, codec) -> None:
    options = {"lengths": (2000, 4000), "depths": 1, "runs": 5, "haystack": text}
    shown = [set(re.findall(r"Sentence \d+ says", prompt)) for _, prompt in prompts(codec, strict=True, **options)]
    assert sum(map(len, shown)) == len(set().union(*shown))
    paper = [set(re.findall(r"Sentence \d+ says", prompt)) for _, prompt in prompts(codec, **options)]
    assert paper[0] == paper[1] < paper[-1]


def test_the_same_seed_asks_the_same(text, codec) -> None:
    options = {"lengths": (800,), "runs": 2, "haystack": text}
    first, again, other = (prompts(codec, seed, **options) for seed in (1, 1, 2))
    assert [p for _, p in first] == [p for _, p in again] != [p for _, p in other]


def test_the_judge() -> None:
    example = Generate(np.zeros(1, np.int32), "123", 20)
    paper, strict = make_task(TASKS["needle"]), make_task(TASKS["needle"], strict=True)
    for output, contains, exact in (
        ("123", 1, 1), (" 123 . and 5", 1, 1), ("1234", 1, 0), ("5 or 123", 1, 0), ("12", 0, 0), ("", 0, 0),
    ):  # fmt: skip
        assert paper.score(example, output)["correct"] == contains
        assert strict.score(example, output) == {"correct": exact, "contains": contains, "exact": exact}


@given(st.text(alphabet="12 .\n", max_size=8), st.integers(0, 8), st.booleans())
def test_what_is_decided_stays_so(text, more, strict) -> None:
    task, example = make_task(TASKS["needle"], strict=strict), Generate(np.zeros(1, np.int32), "12", 9)
    if task.decided(example, text[:more]):
        assert task.score(example, text[:more]) == task.score(example, text)
    assert task.decided(example, "12.")
    assert task.decided(example, "1 12")
    assert not task.decided(example, "12")


def test_cities_are_many_and_unique() -> None:
    assert len(CITIES) == len(set(CITIES)) == 141  # 1 in 141: the ambiguity of the released code's list


def test_a_haystack_is_endless_and_exact(text, codec) -> None:
    whole = codec.encode(Path(text).read_text() + "\n")
    haystack = Haystack(text, codec)
    twice = np.concatenate([whole, whole, whole])
    for start, count in ((0, 10), (100, 3000), (len(whole) - 5, 10), (5, 2 * len(whole)), (len(whole) + 3, 7)):
        assert (haystack.take(start, count) == twice[start : start + count]).all()


def test_the_bundled_haystack(codec) -> None:
    ((_example, prompt),) = prompts(codec, lengths=(2000,), depths=1, runs=1)
    assert "Fellow-Citizens" in prompt or "Fellow Citizens" in prompt


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"haystack": "no/such/place"}, "unknown text 'no/such/place'"),
        ({"lengths": (150,)}, "150 tokens has no room for a haystack: needles, question and answer take"),
        ({"depths": 0}, "depths must be a whole number of at least 1"),
        ({"depth": 3}, "did you mean 'depths'"),
    ],
)
def test_bad_options_teach(options, message, codec) -> None:
    with pytest.raises(ValueError, match=message):
        prompts(codec, **options)


def test_needles_must_fit_the_cities(codec) -> None:
    with pytest.raises(ValueError, match="between 1 and 141"):
        make_task(TASKS["multi-needle"], needles=(200,))


@pytest.mark.parametrize("content", [None, "", "  \n"])
def test_an_empty_haystack(content, codec, tmp_path) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match="is empty" if content is not None else r"holds no \.txt"):
        prompts(codec, haystack=str(tmp_path))


def test_a_tokenizer_without_digits() -> None:
    vocabulary = {c: i for i, c in enumerate("?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .")}
    poor = Tokenizer(BPE(vocabulary, [], unk_token="?"))
    poor.decoder = decoders.Fuse()
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=poor, unk_token="?"))
    with pytest.raises(ValueError, match="cannot encode the needle"):
        prompts(codec, lengths=(500,))
