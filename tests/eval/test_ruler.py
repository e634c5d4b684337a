"""RULER's prompts fill the context, hold their answers, depend on seed and number only, and read as lm-eval's."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm import load_tokenizer
from oncelm.eval import TASKS, Codec, Generate, make_task, read_run, run
from oncelm.eval.tasks import ruler_prompts
from oncelm.eval.tasks.ruler import most_that_fits
from oncelm.eval.tasks.ruler_prompts import KINDS, Draft, Texts

OFFLINE = [name for name, kind in KINDS.items() if not kind.file]
ESSAY = " ".join(f"Essay {i} says that {i * i % 97} is odd. Does it {'really ' * (i % 5)}matter?" for i in range(900))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(load_tokenizer("bytes"), 260)


def test_the_words_are_those_that_lm_eval_draws_from() -> None:
    source = pytest.importorskip("wonderwords").RandomWord(enhanced_prefixes=False)
    for kind, words in Texts("").words.items():
        assert words == sorted(set(source.filter(include_categories=[kind])))
    assert [len(words) for words in Texts("").words.values()] == [6782, 910, 1041]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A folder of texts: nine paragraphs with a question each, and four questions about ten paragraphs each."""
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "essays.txt").write_text(ESSAY)
    (folder / "squad.json").write_text(json.dumps({"data": [_article(a) for a in range(3)]}))
    (folder / "hotpotqa.json").write_text(json.dumps([_hotpot(i) for i in range(4)]))
    return str(folder)


def _article(number: int) -> dict:
    paragraphs = []
    for i in range(3):
        answers = [{"text": f"town {number}{i}"}, {"text": f"the town {number}{i}"}, {"text": f"town {number}{i}"}]
        asked = [
            {"question": f"Where is {number}{i}?", "answers": answers, "is_impossible": False},
            {"question": "Why?", "answers": [], "is_impossible": True},
        ]
        paragraphs.append({"context": f"Man {number}{i} lives in the town {number}{i}, they say.", "qas": asked})
    return {"paragraphs": paragraphs}


def _hotpot(number: int) -> dict:
    context = [[f"Title {number}{i}", [f"Line {number}{i}.", " More."]] for i in range(10)]
    facts = [[f"Title {number}3", 0], [f"Title {number}7", 1]]
    return {
        "question": f"What is {number}?",
        "answer": f"line {number}7",
        "context": context,
        "supporting_facts": facts,
    }


def fill(codec: Codec, data: str, name: str, length: int, sample: int = 0, seed: int = 0):
    """Text, answers and units of a sample."""
    task = make_task(TASKS["ruler"], lengths=(length,), data=data)
    ids, answers, units = task._fill(codec, Texts(data), seed, name, length, sample, 0)
    return codec.decode(ids), answers, units, len(ids)


# -- sizes, draws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=5)
@given(st.integers(2500, 9000), st.integers(0, 3), st.integers(0, 5))
def test_prompts_fill_the_context_and_hold_their_answers(codec, data, name, length, seed, sample) -> None:
    """One more unit of haystack would be too much, unless there is no more; the answers stand in the text."""
    text, answers, units, count = fill(codec, data, name, length, sample, seed)
    room = length - KINDS[name].max_new_tokens
    assert count <= room
    random, texts = np.random.default_rng([seed, length, list(KINDS).index(name), sample]), Texts(data)
    drafts = (KINDS[name].draft(texts, random, length) for _ in range(64))
    draft = next(draft for draft in drafts if len(codec.encode(draft.text(draft.least))) <= room)
    assert draft.text(units) == text
    assert units == draft.most or len(codec.encode(draft.text(units + 1))) > room
    assert all(answer.lower() in text.lower() for answer in answers)
    assert text.rstrip()[-1] in ":se"  # the beginning of an answer: "they are:", "text is", "text are"


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_depends_on_seed_and_number_only(codec, data, name) -> None:
    def prompts(samples: int, seed: int = 0) -> list[bytes]:
        task = make_task(TASKS["ruler"], lengths=(3000,), samples=samples, only=name, data=data)
        examples = list(task.examples(codec, seed))
        assert len(examples) == task.count() == samples
        return [bytes(example.prompt) for example in examples]

    few, many = prompts(2), prompts(4)
    assert few == many[:2] == prompts(2)
    assert prompts(2, seed=1) != few


def test_needles_differ_and_stand_among_others(codec, data) -> None:
    text, answers, units, _ = fill(codec, data, "niah_multikey_3", 6000)
    needles = re.findall(r"One of the special magic uuids for (\S+) is: (\S+)\.\n", text)
    assert len(needles) == len(dict(needles)) == units + 1
    asked = re.search(r"uuid for (\S+) mentioned", text)[1]
    assert [dict(needles)[asked]] == answers


def test_common_and_frequent_words_are_that(codec, data) -> None:
    text, answers, _, _ = fill(codec, data, "ruler_cwe", 9000)
    listed = re.findall(r"\d+\. (.+?)(?= \d+\.|\nQ)", text)
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, count in counts.items() if count == 30} == set(answers)
    assert set(counts.values()) == {30, 3}
    for length in range(900, 1500, 50):  # short texts, where the fourth and fifth word might tie
        text, answers, _, _ = fill(codec, data, "ruler_fwe", length)
        words = text.partition("coded words. ")[2].partition("\nQuestion")[0].split()
        ranked = sorted((-words.count(word), word) for word in {*words} - {"..."})
        assert {word for _, word in ranked[:3]} == set(answers)
        assert len(ranked) == 3 or ranked[3][0] > ranked[2][0]


def test_more_words_than_there_are_come_more_often(monkeypatch, data) -> None:
    texts = Texts(data)
    texts.__dict__["all_words"] = [f"w{i}" for i in range(40)]
    draft = KINDS["ruler_cwe"].draft(texts, np.random.default_rng(0), 4096)
    sizes = [len(re.findall(r"\d+\. w", draft.text(count))) for count in range(11, 200)]
    assert all(abs(b - a) < 400 for a, b in pairwise(sizes))
    listed = re.findall(r"\d+\. (w\d+)", draft.text(80))
    assert {word: listed.count(word) for word in draft.answers} == dict.fromkeys(draft.answers, 60)


def test_essays_begin_anew() -> None:
    essays = ruler_prompts.Essays("One two. Three four.")
    depths = np.array([1.0, 0.0, 0.5])
    assert essays.with_needles(6, ["a", "b", "c"], depths) == "b One two. c Three four. One two. a"


def test_hotpot_keeps_what_is_necessary(codec, data) -> None:
    text, answers, units, _ = fill(codec, data, "ruler_qa_hotpot", 500)
    number = answers[0][5]
    assert 2 <= units < 10
    assert f"Title {number}3\nLine {number}3. More." in text
    assert f"Title {number}7\nLine {number}7. More." in text
    text, _, units, _ = fill(codec, data, "ruler_qa_hotpot", 9000)
    assert units == 40
    assert sorted(re.findall(r"Document (\d+):\nTitle", text), key=int) == [str(i + 1) for i in range(40)]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 3000), st.integers(0, 500), st.integers(1, 9), st.integers(0, 400))
def test_the_search(least, room, guess, size, more) -> None:
    """The most units that fit, from any guess, though tokens do not grow evenly."""
    asked = []

    def encode(text: str) -> np.ndarray:
        asked.append(text)
        return np.zeros(20 + size * len(text) + len(text) // 7 % 3, np.int32)

    draft = Draft(lambda count: "x" * count, [], least, least + more)
    ids, units = most_that_fits(draft, encode, room, guess)
    if len(encode("x" * least)) > room:
        assert units == least - 1
        assert len(ids) == len(encode("x" * least))
    else:
        assert len(ids) == len(encode("x" * units)) <= room
        assert units == least + more or len(encode("x" * (units + 1))) > room
    del asked[:]
    most_that_fits(draft, encode, room, guess)
    assert len(asked) < 24


# -- the judge, the run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "output", "scores"),
    [
        ("ruler_vt", "abc, and XYZ.", (1, 1, 1)),
        ("ruler_vt", "abc", (0.5, 0.5, 1)),
        ("ruler_vt", "", (0, 0, 0)),
        ("ruler_qa_squad", "xyz\x00abc", (1, 1, 1)),
        ("ruler_qa_squad", "It is aBc!", (1, 0.5, 1)),
        ("ruler_qa_squad", "x", (0, 0, 0)),
    ],
)
def test_the_judge(data, task, output, scores) -> None:
    judge = make_task(TASKS["ruler"], data=data)
    example = Generate(np.zeros(1, np.int32), "ABC | xyz", 9, tags={"task": task})
    assert judge.score(example, output) == dict(zip(("correct", "all", "any"), scores, strict=True))


def test_a_run_and_its_table(tmp_path, data, language_models) -> None:
    """The run resumes; the average stands below."""
    model = language_models("retention")
    task = make_task(TASKS["ruler"], lengths=(1500, 2000), samples=2, only="ruler_qa_squad,ruler_vt", data=data)
    out = tmp_path / "r.jsonl"
    run(task, model, out, limit=5)
    done = run(task, model, out)
    assert len(done.samples) == len(read_run(out).samples) == task.count() == 8
    assert [s["tags"]["task"] for s in done.samples.values()] == ["ruler_qa_squad"] * 2 + ["ruler_vt"] * 2 + [
        "ruler_qa_squad"
    ] * 2 + ["ruler_vt"] * 2
    for number, sample in enumerate(done.samples.values()):
        sample["scores"]["correct"] = float(number < 3)
    (table,) = TASKS["ruler"].views([done])
    assert table.header == ["task", "1,500", "2,000"]
    assert [row[0] for row in table.rows] == ["ruler_vt", "ruler_qa_squad", "average of 2"]
    assert [row[1][:4] for row in table.rows] == ["0.50", "1.00", "0.75"]
    assert table.rows[-1][1:] == ["0.75", "0.00"]


def test_without_data_there_are_six_tasks() -> None:
    assert make_task(TASKS["ruler"]).tasks() == OFFLINE
    assert len(OFFLINE) == 6


# -- bad input --------------------------------------------------------------------------------------------------------


def test_too_short(codec, data) -> None:
    for name in KINDS:
        task = make_task(TASKS["ruler"], lengths=(150,), samples=1, only=name, data=data)
        with pytest.raises(ValueError, match=rf"150 tokens is too short for {name}: .* take (\d+) tokens") as error:
            list(task.examples(codec, 0))
        least = int(re.search(r"take (\d+)", str(error.value))[1])
        assert fill(codec, data, name, least + 60)[3] <= least + 60  # other draws are a little longer


def test_bad_options(data, tmp_path) -> None:
    ruler = TASKS["ruler"]
    with pytest.raises(ValueError, match=r"niah_singel_1.*niah_single_1"):
        make_task(ruler, only="niah_singel_1")
    with pytest.raises(ValueError, match=r"ruler_qa_squad needs --data DIR, a folder with squad.json"):
        make_task(ruler, only="ruler_vt,ruler_qa_squad")
    with pytest.raises(ValueError, match="no folder of texts at nowhere"):
        make_task(ruler, data="nowhere")
    (tmp_path / "essays.txt").write_text("Text.")
    with pytest.raises(ValueError, match=r"lacks squad.json, which ruler_qa_squad needs; it has: essays.txt"):
        make_task(ruler, data=str(tmp_path))
    make_task(ruler, data=str(tmp_path), only="niah_single_2,ruler_vt")
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1"):
        make_task(ruler, samples=0)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("squad.json", "{"), ("squad.json", "[]"), ("squad.json", '{"data": [{"x": 1}]}'), ("hotpotqa.json", "[]"),
        ("hotpotqa.json", '{"data": 1}'), ("essays.txt", " \n"),
    ],
)  # fmt: skip
def test_damaged_texts(codec, tmp_path, file, content) -> None:
    (tmp_path / file).write_text(content)
    name = next(name for name, kind in KINDS.items() if kind.file == file)
    task = make_task(TASKS["ruler"], lengths=(3000,), only=name, data=str(tmp_path))
    with pytest.raises(ValueError, match=file):
        next(iter(task.examples(codec, 0)))


# -- lm-eval's text ---------------------------------------------------------------------------------------------------


class Drawn:
    """Stands for `random` in lm-eval's modules: what it "draws" is what our prompt was made of."""

    def __init__(self, **given) -> None:
        self.__dict__.update(given)

    def Random(self, seed):
        return SimpleNamespace(shuffle=self.shuffle)


def to(order: list):
    """A shuffle that ends in this order."""

    def shuffle(items: list) -> None:
        assert sorted(items) == sorted(order)
        items[:] = order

    return shuffle


@pytest.fixture(scope="module")
def lm_eval_ruler():
    """lm-eval's modules; without this, one of them asks the network for data at import."""
    pytest.importorskip("lm_eval")
    wonderwords = pytest.importorskip("wonderwords")
    nltk = pytest.importorskip("nltk")
    few = {"nouns": ["sky"], "adjectives": ["blue"], "verbs": ["fall"]}  # it sorts every adjective with every noun
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_: True)
        patch.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=few))
        from lm_eval.tasks.ruler import prepare_niah
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, qa_utils, vt_utils

    return SimpleNamespace(
        cwe=cwe_utils, fwe=fwe_utils, niah=niah_utils, prepare=prepare_niah, qa=qa_utils, vt=vt_utils
    )


NIAH = {
    "niah_single_1": {"type_haystack": "repeat"},
    "niah_single_2": {},
    "niah_single_3": {"type_needle_v": "uuids"},
    "niah_multikey_1": {"num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle"},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue": {"num_needle_v": 4},
    "niah_multiquery": {"num_needle_q": 4},
}  # as lm-eval's functions of these names call generate_samples


@pytest.mark.parametrize("name", NIAH)
def test_needles_read_as_lm_evals(codec, data, name, lm_eval_ruler, monkeypatch) -> None:
    module = lm_eval_ruler.prepare
    options = {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers", **NIAH[name]}
    sentence = r"One of the special magic \w+ for (.+?) is: (\S+)\."
    for number in range(100):  # lm-eval writes two spaces where a needle stands first, last or behind another one
        text, answers, units, _ = fill(codec, data, name, 5000, number)
        context = text.partition("afterwards.\n")[2].rpartition("\nWhat ")[0]
        if all(part.strip() for part in re.split(sentence, context)) or "haystack" in str(NIAH[name]):
            break
    needles = re.findall(sentence, context)
    asked = re.split(r", and |, ", re.search(r"special magic \w+ for (.+?) mentioned", text)[1])
    own = needles
    script: list[str] = []
    if options["type_haystack"] == "essay":
        haystack = ESSAY.split()
        sentences = re.split(r"(?<=[.?])\s", " ".join(haystack[:units]))
        monkeypatch.setattr(module, "cached_sent_tokenize", lambda text: re.split(r"(?<=[.?])\s", text))
        before, places = re.split(sentence, context), []
        for i in range(len(needles)):
            places.append(len(re.findall(r"[.?](?=\s)", " ".join(before[: 3 * i + 1 : 3]))))
        depths = [100 * (place + 0.5) / len(sentences) for place in places]
    else:
        haystack = module.get_haystack(options["type_haystack"])
        own = [needle for needle in needles if needle[0] in asked]
        lines = [re.match(sentence, line) for line in context.split("\n")]
        depths = [next(i for i, line in enumerate(lines) if line and line[1] in asked)]
    values = {key: [v for k, v in own if k == key] for key, _ in own}
    for key, of_key in values.items():
        script += [key, *of_key]
    for key, value in needles:
        script += [key, value] if (key, value) not in own else []
    drawn = iter(script)

    def sample(population, count):
        if isinstance(population, list):
            return depths
        return depths if len(population) == units and count == len(own) else [list(values).index(key) for key in asked]

    def scripted(num_haystack, *arguments, **keywords):
        nonlocal drawn
        drawn = iter(script)
        return original(units, *arguments, **keywords)

    original = module.generate_input_output
    plural = options["type_needle_v"]
    order = [f"One of the special magic {plural} for {key} is: {value}." for key, value in own]
    monkeypatch.setattr(module, "generate_random", lambda kind: next(drawn))
    monkeypatch.setattr(module, "random", Drawn(sample=sample, shuffle=to(order)))
    monkeypatch.setattr(module, "generate_input_output", scripted)
    prompt_tokens = len(text.rpartition(" The special")[0])
    (theirs,) = module.generate_samples(
        haystack, lambda text: SimpleNamespace(input_ids=text), max_seq_length=prompt_tokens + 128, num_samples=1,
        template=lm_eval_ruler.niah.TEMPLATE, **options,
    )  # fmt: skip
    assert f"{theirs['input']} {theirs['gen_prefix']}" == text
    assert sorted(theirs["outputs"]) == sorted(answers)


def test_variables_read_as_lm_evals(codec, data, lm_eval_ruler, monkeypatch) -> None:
    module = lm_eval_ruler.vt
    text, answers, units, _ = fill(codec, data, "ruler_vt", 5000)
    example, _, asked = text.partition("\n\n\n\n")
    drawn: list = []

    def places(lines: list[str]) -> list[int]:
        """Of the assignments among the filler, as `random.sample` would have given them."""
        at = [i for i, line in enumerate(lines) if line.startswith("VAR")]
        return [place - i for i, place in enumerate(at)]

    def take(part: str) -> tuple[list[str], int, list[int]]:
        lines = re.findall(r"VAR [A-Z]+ = (?:\d+|VAR [A-Z]+ )|The grass .*?again\.\n", part)
        return re.findall(r"VAR ([A-Z]+) = ", part), int(re.search(r"= (\d+)", part)[1]), places(lines)

    monkeypatch.setattr(module, "random", Drawn(choices=lambda _, k: list(drawn[0].pop(0)), sample=lambda *_: drawn[2]))
    monkeypatch.setattr(module, "np", SimpleNamespace(random=SimpleNamespace(randint=lambda *_: drawn[1])))
    drawn[:] = take(example.rpartition("\nQuestion")[0])
    names = list(drawn[0])
    shown, found = module.generate_input_output(example.count("The grass"), 1, 4, is_icl=True)
    assert found == names
    drawn[:] = take(asked)
    made = module.generate_input_output(units, 1, 4)
    drawn[0] = names  # lm-eval exchanges the example's at last
    size = len(text) + 30  # in characters, as the tokenizer counts here; below it lm-eval would loop for ever
    assert len(made[0]) + len(shown) + len(" ".join(names)) <= size - 30
    monkeypatch.setattr(module, "generate_input_output", lambda *_, **options: made)
    (theirs,) = module.sys_vartrack_w_noise_random(
        lambda text: SimpleNamespace(input_ids=text), 1, size, icl_example={"input": shown, "outputs": names}
    )
    assert f"{theirs['input']} {theirs['gen_prefix']}" == text
    assert theirs["outputs"] == answers


def test_common_words_read_as_lm_evals(codec, data, lm_eval_ruler, monkeypatch) -> None:
    module = lm_eval_ruler.cwe
    text, answers, units, _ = fill(codec, data, "ruler_cwe", 9000)
    listed = re.findall(r"\d+\. (.+?)(?= \d+\.|\nQ)", text)
    words = [*answers, *dict.fromkeys(word for word in listed if word not in answers)]
    assert len(words) == units
    assert {*words} <= {*module.WORDS}
    monkeypatch.setattr(module, "random", Drawn(sample=lambda population, count: words[:count]))
    monkeypatch.setattr(module, "RNG", Drawn(shuffle=lambda items: len(items) == len(listed) and to(listed)(items)))
    _, theirs, found = module.generate_input_output(units, 9000)
    prefix = module.CONFIG["answer_prefix"]
    assert theirs.removesuffix(prefix) + "\n\n" + prefix.strip() == text  # ruler_cwe's target_delimiter
    assert found == answers


def test_frequent_words_read_as_lm_evals(codec, data, lm_eval_ruler, monkeypatch) -> None:
    module = lm_eval_ruler.fwe
    text, answers, units, _ = fill(codec, data, "ruler_fwe", 5000)
    listed = text.partition("coded words. ")[2].partition("\nQuestion")[0].split()
    words = sorted({*listed}, key=lambda word: (word != "...", -listed.count(word), word))
    words += [f"{i:06}" for i in range(100 - len(words))]
    drawn = iter(["dotted", *words[1:]])

    def shuffle(items: list) -> None:
        to(listed if "..." in items else ["dotted", *words[1:]])(items)

    monkeypatch.setattr(module, "random", Drawn(choices=lambda *_, k: list(next(drawn)), shuffle=shuffle))
    theirs, found, _ = module.generate_input_output(
        5000, lambda text: SimpleNamespace(input_ids=""), num_words=units, vocab_size=100
    )
    assert theirs == text
    assert sorted(found) == sorted(answers)


@pytest.mark.parametrize("name", ["ruler_qa_squad", "ruler_qa_hotpot"])
def test_questions_read_as_lm_evals(codec, data, name, lm_eval_ruler, monkeypatch) -> None:
    module = lm_eval_ruler.qa
    file, read = {
        "ruler_qa_squad": ("squad.json", module.read_squad), "ruler_qa_hotpot": ("hotpotqa.json", module.read_hotpotqa)
    }[name]  # fmt: skip
    monkeypatch.setattr(module, "download_json", lambda url: json.loads(Path(data, file).read_text()))
    read.cache_clear()
    questions, documents = read()
    read.cache_clear()
    text, answers, units, _ = fill(codec, data, name, 750)
    listed = re.findall(r"Document \d+:\n(.+?)\n\n(?=Doc|Ans)", text, re.DOTALL)
    assert len(listed) == units < len(documents)
    index = next(i for i, one in enumerate(questions) if f"Question: {one['query']} " in text)
    own = {*questions[index]["context"], *questions[index].get("more_context", [])}
    chosen = [documents.index(document) for document in listed]
    added = [i for i in chosen if i not in own]
    monkeypatch.setattr(module, "random", Drawn(sample=lambda population, count: added[:count], shuffle=to(listed)))
    theirs, found = module.generate_input_output(index, units, questions, documents)
    assert f"{theirs} Answer:" == text
    assert list(dict.fromkeys(found)) == answers
