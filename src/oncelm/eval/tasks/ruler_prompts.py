"""The prompts of RULER's thirteen tasks (arXiv 2404.06654), with lm-eval 0.4.13's wording, at any size.

A prompt is drafted first: everything random in it is drawn, and `Draft.text(n)` is its text with n units of haystack.
How many units a context has room for is ruler.py's business. What lm-eval's own generators do otherwise, and why they
are not called, stands in docs/decisions.md.
"""

from __future__ import annotations

import math
import re
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from oncelm.utils.settings import parse_json

Random = np.random.Generator

ESSAYS, SQUAD, HOTPOT = "essays.txt", "squad.json", "hotpotqa.json"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Draft:
    """A prompt but for its length.

    Attributes:
        text: the prompt with so many units of haystack, the beginning of its answer included.
        answers: what is looked for in the output, in lower case.
        least: units without which it is no sample.
        most: units that there are.
    """

    text: Callable[[int], str]
    answers: list[str]
    least: int = 1
    most: int = 1 << 40


@dataclass(frozen=True)
class Kind:
    """One of the tasks.

    Attributes:
        draft: draws a prompt for a context of so many tokens.
        max_new_tokens: of the answer.
        file: that it needs of the folder of texts; "" for none.
        any_answer: one of the answers suffices; else the share of them that is found counts.
    """

    draft: Callable[[Texts, Random, int], Draft]
    max_new_tokens: int
    file: str = ""
    any_answer: bool = False


@dataclass(frozen=True)
class Question:
    """A question about documents (indices), the necessary ones first, then ones like them."""

    text: str
    answers: list[str]
    necessary: list[int]
    alike: list[int]


class Texts:
    """What prompts are made of: English words, and a folder's essays, questions and documents; each read once."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """Nouns, adjectives and verbs: those of the package that lm-eval takes, kept here so that prompts stay."""
        text = files("oncelm.eval.tasks").joinpath("ruler_words.txt").read_text(encoding="utf-8")
        lists = [block.split("\n") for block in text.strip().split("\n\n")]  # some have two words
        return {kind: words for kind, *words in lists}

    @cached_property
    def all_words(self) -> list[str]:
        return sorted({word for words in self.words.values() for word in words})

    @cached_property
    def essays(self) -> Essays:
        return Essays(self._read(ESSAYS))

    @cached_property
    def squad(self) -> tuple[list[Question], list[str]]:
        """The answerable questions of SQuAD 2.0's JSON, and all paragraphs."""
        articles = [article["paragraphs"] for article in self._json(SQUAD, "data", "paragraphs")]
        documents = sorted({paragraph["context"] for article in articles for paragraph in article})
        place = {document: i for i, document in enumerate(documents)}
        questions = []
        for article in articles:
            for paragraph in article:
                own = place[paragraph["context"]]
                others = sorted({place[other["context"]] for other in article} - {own})
                for asked in paragraph["qas"]:
                    if not asked.get("is_impossible"):
                        answers = list(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                        questions.append(Question(asked["question"], answers, [own], others))
        return questions, documents

    @cached_property
    def hotpot(self) -> tuple[list[Question], list[str]]:
        """The questions of HotpotQA's distractor setting with their ten paragraphs, and all paragraphs."""
        entries = self._json(HOTPOT, "", "context")
        titled = [{title: f"{title}\n{''.join(lines)}" for title, lines in entry["context"]} for entry in entries]
        documents = sorted({document for entry in titled for document in entry.values()})
        place = {document: i for i, document in enumerate(documents)}
        questions = []
        for entry, own in zip(entries, titled, strict=True):
            told = {title for title, _ in entry["supporting_facts"]}
            necessary = [place[document] for title, document in own.items() if title in told]
            alike = [place[document] for title, document in own.items() if title not in told]
            questions.append(Question(entry["question"], [entry["answer"]], necessary, alike))
        return questions, documents

    def _json(self, name: str, key: str, member: str) -> list[dict[str, Any]]:
        """A list of objects that have `member`: the file, or what it has under `key`."""
        try:
            content = parse_json(self._read(name))
            entries = content[key] if key else content
            if not entries or any(member not in entry for entry in entries):
                raise ValueError(f"no list of objects with {member!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / name} is not the file that was published as such ({error}).") from None
        return entries

    def _read(self, name: str) -> str:
        try:
            text = (self.folder / name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.folder / name} is not UTF-8 text: {error}.") from None
        if not text.strip():
            raise ValueError(f"{self.folder / name} is empty.")
        return text


class Essays:
    """A text as a row of words that begins anew at its end, and where its sentences end."""

    def __init__(self, text: str) -> None:
        self._text = text.split()
        self._grow(len(self._text))

    def _grow(self, count: int) -> None:
        self.words = self._text * -(-count // len(self._text))
        ends = [i for i, word in enumerate(self.words, start=1) if re.search(r"[.!?][\"')\]]*$", word)]
        self._ends = np.array(ends, np.int64)

    def with_needles(self, count: int, needles: list[str], depths: np.ndarray) -> str:
        """The first `count` words, with needle i between two sentences, depths[i] (0 to 1) of all sentences before."""
        if count > len(self.words):
            self._grow(count)
        ends = [*self._ends[: np.searchsorted(self._ends, count)].tolist(), count]
        parts, at = [], 0
        for depth, needle in sorted(zip(depths, needles, strict=True)):
            sentence = int(len(ends) * depth)
            place = ends[sentence - 1] if sentence else 0
            parts += [*self.words[at:place], needle]
            at = place
        return " ".join([*parts, *self.words[at:count]])


# -- needles ----------------------------------------------------------------------------------------------------------

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
DEPTHS = np.round(np.linspace(0, 100, 40)) / 100  # of needles in essays


def _needles(
    haystack: str, key: str = "words", value: str = "numbers", keys: int = 1, values: int = 1, asked: int = 1
) -> Callable[[Texts, Random, int], Draft]:
    """Keys with values each, hidden in the haystack: "repeat" (five sentences), "essays", or "needles" (others)."""

    def draft(texts: Texts, random: Random, length: int) -> Draft:
        names = _distinct(lambda: _draw(key, texts, random))
        magic = [(next(names), [_draw(value, texts, random) for _ in range(values)]) for _ in range(keys)]
        hidden = [NEEDLE.format(kind=value, key=name, value=one) for name, own in magic for one in own]
        hidden = [hidden[i] for i in random.permutation(len(hidden))]
        chosen = [magic[i] for i in random.choice(keys, asked, replace=False)]
        queries = [name for name, _ in chosen]
        query = ", ".join(queries[:-1]) + ", and " + queries[-1] if asked > 1 else queries[0]
        single = asked * values == 1
        template, kind = (ONE, value.removesuffix("s")) if single else (SEVERAL, value)
        depths = random.choice(DEPTHS, len(hidden), replace=False)
        place = float(random.random())
        others: list[str] = []

        def text(count: int) -> str:
            if haystack == "essays":
                context = texts.essays.with_needles(count, hidden, depths)
            else:
                while haystack == "needles" and len(others) < count:
                    other = {"kind": value, "key": next(names), "value": _draw(value, texts, random)}
                    others.append(NEEDLE.format(**other))
                lines = others[:count] if haystack == "needles" else [FILLER] * count
                at = int(place * count)
                context = "\n".join([*lines[:at], *hidden, *lines[at:]])
            return template.format(kind=kind, context=context, query=query)

        return Draft(text, [one for _, own in chosen for one in own])

    return draft


def _draw(kind: str, texts: Texts, random: Random) -> str:
    if kind == "numbers":
        return str(random.integers(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(bytes=random.bytes(16), version=4))
    adjectives, nouns = texts.words["adjective"], texts.words["noun"]
    return f"{adjectives[random.integers(len(adjectives))]}-{nouns[random.integers(len(nouns))]}"


def _distinct(draw: Callable[[], str]) -> Iterator[str]:
    """What `draw` gives, each once."""
    seen: set[str] = set()
    while True:
        drawn = draw()
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


# -- variable tracking ------------------------------------------------------------------------------------------------

CHAIN = 5  # variables with one value
EXAMPLE_LINES = 10  # of filler in the example before the question
TRACK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assgined the value {value}, they are:"
)  # the spelling is RULER's


def _tracking(texts: Texts, random: Random, length: int) -> Draft:
    """A chain of assignments, in order, among five sentences over and over, behind an example with its answer."""
    shown, asked = _chain(random, letters=3), _chain(random, letters=5)

    def text(count: int) -> str:
        lines = min(EXAMPLE_LINES, -(-count // 4))  # in a short text, the example is short too
        return f"{shown.question(lines)}  {' '.join(shown.names)}\n\n\n\n{asked.question(count)}"

    return Draft(text, asked.names)


@dataclass(frozen=True)
class _Chain:
    names: list[str]
    value: int
    places: list[float]  # of each assignment, ascending, 0 to 1

    def question(self, count: int) -> str:
        """The question for the names, with the assignments among so many lines of filler."""
        assignments = [f"VAR {self.names[0]} = {self.value}"]
        assignments += [f"VAR {name} = VAR {before} " for before, name in zip(self.names, self.names[1:], strict=False)]
        lines = [FILLER + "\n"] * count
        for i, (place, assignment) in enumerate(zip(self.places, assignments, strict=True)):
            lines.insert(int(place * count) + i, assignment)
        return TRACK.format(context=" ".join(lines), value=self.value, count=CHAIN)


def _chain(random: Random, letters: int) -> _Chain:
    names = _distinct(lambda: _letters(random, string.ascii_uppercase, letters))
    return _Chain(
        list(islice(names, CHAIN)), int(random.integers(10_000, 99_999)), np.sort(random.random(CHAIN)).tolist()
    )


def _letters(random: Random, alphabet: str, count: int) -> str:
    return "".join(alphabet[i] for i in random.integers(len(alphabet), size=count))


# -- words that come often --------------------------------------------------------------------------------------------

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?\n\n"
    "Answer: The top 10 words that appear most often in the list are:"
)
COMMON_WORDS = 10
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)


def _common_words(texts: Texts, random: Random, length: int) -> Draft:
    """Ten words come 30 times (6 in short lists), the others 3 times (once).

    Where a list needs more words than there are, it has each of them a multiple of that.
    """
    words = [texts.all_words[i] for i in random.permutation(len(texts.all_words))]
    often, rarely = (30, 3) if length >= 4096 else (6, 1)
    order = int(random.integers(1 << 32))

    def text(count: int) -> str:
        times = -(-count // len(words))
        own = words[: count // times]
        listed = own[:COMMON_WORDS] * (often * times) + own[COMMON_WORDS:] * (rarely * times)
        shuffled = (listed[i] for i in np.random.default_rng(order).permutation(len(listed)))
        return COMMON.format(context=" ".join(f"{i}. {word}" for i, word in enumerate(shuffled, start=1)))

    return Draft(text, words[:COMMON_WORDS], least=COMMON_WORDS + 1)


def _frequent_words(texts: Texts, random: Random, length: int) -> Draft:
    """Words of six letters, the one of rank k about 1 / k^2 of all; the first is dots, the next three are asked for."""
    coded = _distinct(lambda: _letters(random, string.ascii_lowercase, 6))
    words = ["...", *islice(coded, max(10, length // 50) - 1)]
    shares = np.arange(1, len(words) + 1) ** -2.0 / (math.pi**2 / 6)
    order = int(random.integers(1 << 32))

    def text(count: int) -> str:
        times = (count * shares).astype(int)
        while times[3] == times[4] and count > FEWEST_CODED:  # nobody could tell the third word asked for
            count -= 1
            times = (count * shares).astype(int)
        listed = np.repeat(words, times)
        return FREQUENT.format(context=" ".join(np.random.default_rng(order).permutation(listed)))

    return Draft(text, words[1:4], least=FEWEST_CODED)


FEWEST_CODED = 27  # so that the third word asked for comes once, and the next one never


# -- questions about documents ----------------------------------------------------------------------------------------

TOLD = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
ABOUT = f"{TOLD}\n\nThe following are given documents.\n\n{{context}}\n\n{TOLD}\n\nQuestion: {{query}} Answer:"


def _questions(name: str) -> Callable[[Texts, Random, int], Draft]:
    """A question about some documents: they, ones of the same subject as far as there is room, then any others."""

    def draft(texts: Texts, random: Random, length: int) -> Draft:
        questions, documents = getattr(texts, name)
        asked: Question = questions[random.integers(len(questions))]
        own = {*asked.necessary, *asked.alike}
        strangers = [i for i in random.permutation(len(documents)).tolist() if i not in own]
        chosen = [*asked.necessary, *(asked.alike[i] for i in random.permutation(len(asked.alike))), *strangers]
        order = int(random.integers(1 << 32))

        def text(count: int) -> str:
            shuffled = (chosen[i] for i in np.random.default_rng(order).permutation(count))
            listed = (f"Document {i}:\n{documents[document]}" for i, document in enumerate(shuffled, start=1))
            return ABOUT.format(context="\n\n".join(listed), query=asked.text)

        return Draft(text, asked.answers, least=len(asked.necessary), most=len(chosen))

    return draft


KINDS = {
    "niah_single_1": Kind(_needles("repeat"), 128),
    "niah_single_2": Kind(_needles("essays"), 128, ESSAYS),
    "niah_single_3": Kind(_needles("essays", value="uuids"), 128, ESSAYS),
    "niah_multikey_1": Kind(_needles("essays", keys=4), 128, ESSAYS),
    "niah_multikey_2": Kind(_needles("needles"), 128),
    "niah_multikey_3": Kind(_needles("needles", key="uuids", value="uuids"), 128),
    "niah_multivalue": Kind(_needles("essays", values=4), 128, ESSAYS),
    "niah_multiquery": Kind(_needles("essays", keys=4, asked=4), 128, ESSAYS),
    "ruler_vt": Kind(_tracking, 30),
    "ruler_cwe": Kind(_common_words, 120),
    "ruler_fwe": Kind(_frequent_words, 50),
    "ruler_qa_squad": Kind(_questions("squad"), 32, SQUAD, any_answer=True),
    "ruler_qa_hotpot": Kind(_questions("hotpot"), 32, HOTPOT, any_answer=True),
}
