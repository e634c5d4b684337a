"""Facts to hide in a text: a name, a number, the sentence that tells it, and the question that asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oncelm.eval.tasks.cities import CITIES
from oncelm.eval.tasks.needle import LARGEST_NUMBER, NEEDLE, QUESTION

# (sentence, question with the beginning of its answer). The evaluation's own comes as often as all others together;
# the others keep what is learned from being that one sentence.
Forms = tuple[tuple[str, str], ...]
FORMS: Forms = (
    (NEEDLE, QUESTION),
    (
        "One of the special magic numbers for {city} is: {number} . ",
        "\nWhat is the special magic number for {city}? The special magic number for {city} is: ",
    ),
    ("The pass key of {city} is {number} . ", "\nWhat is the pass key of {city}? The pass key of {city} is "),
    ("{city} was given the code {number} . ", "\nWhich code was {city} given? {city} was given the code "),
    ("Remember that {city} = {number} . ", "\nDo you remember? {city} = "),
)
LONGEST_NUMBER = 8  # digits
_NOT_LEARNED = frozenset(word.casefold() for city in CITIES for word in city.split())
_ONSETS = "b bl br c ch d dr f fl g gr h j k kr l m n p pr qu r s sh st t th tr v w y z"
_VOWELS = "a e i o u ai au ea ia io ou"
_CODAS = "d l ll m n nd nt r rk s st t x"
_SYLLABLE = (_ONSETS.split(), _VOWELS.split(), ["", "", "", *_CODAS.split()])


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, and the question for it with its answer."""

    needle: str
    question: str


class Names:
    """Names for facts: words of the text, invented ones, pairs of either; no word of the evaluation's cities."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [word for word in words if word.casefold() not in _NOT_LEARNED]

    def draw(self, count: int, random: np.random.Generator) -> list[str]:
        """Different ones."""
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            words = [self._word(random) for _ in range(2 if random.random() < 0.15 else 1)]
            if _NOT_LEARNED.isdisjoint(word.casefold() for word in words):
                drawn[" ".join(words)] = None
        return list(drawn)

    def _word(self, random: np.random.Generator) -> str:
        if self.words and random.random() < 0.5:
            return _pick(self.words, random)
        syllables = ("".join(_pick(part, random) for part in _SYLLABLE) for _ in range(random.integers(2, 4)))
        return "".join(syllables).capitalize()


def other_forms(leave_out: str | None = None) -> Forms:
    """All forms but the needle evaluation's own and those that say `leave_out`, whatever is measured with."""
    return tuple(form for form in FORMS[1:] if leave_out is None or leave_out not in form[0])


def draw_fact(name: str, others: Forms, random: np.random.Generator) -> Fact:
    """Half of the facts in the needle evaluation's words, half of the numbers as it draws them."""
    needle, question = FORMS[0] if random.random() < 0.5 else others[random.integers(0, len(others))]
    as_evaluated = random.random() < 0.5
    number = random.integers(1, LARGEST_NUMBER + 1) if as_evaluated else 10 ** random.uniform(0, LONGEST_NUMBER)
    values = {"city": name, "number": int(number)}
    return Fact(needle.format(**values), f"{question}{{number}} . ".format(**values))


def _pick(choices: Sequence[str], random: np.random.Generator) -> str:
    return choices[int(random.integers(len(choices)))]
