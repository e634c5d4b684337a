"""From prompt to prompt, reading only what is new.

Prompts in a row often begin alike: one haystack with its needle ever deeper, one document with many questions, one
question with its choices. The reader stops where the next prompts part from this one, and marks the place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oncelm.eval.codec import common_prefix
from oncelm.eval.examples import Example
from oncelm.eval.model import LanguageModel, Reader

WORTH_SHARING = 16  # tokens: shorter common beginnings are read again, here and in rows side by side (harness/tree.py)


class PrefixReader:
    """Holds one reader, and a stack of marks along the prompt that it read last."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.reader: Reader | None = None
        self.text = np.empty(0, np.int32)  # the last prompt
        self.marks: list[tuple[int, Any]] = []  # (tokens before it, mark), ever deeper

    def read(
        self, example: Example, upcoming: Sequence[Example], progress: Callable[[int], object] | None = None
    ) -> tuple[Reader, int]:
        """A reader that has read the example's prompt and has room for what follows, and the tokens it had to read.

        Args:
            example: the one to read now.
            upcoming: the ones to follow, as far as they are known.
            progress: told the tokens of the prompt that are read so far.
        """
        prompt = example.prompt
        shared = common_prefix(self.text, prompt)
        while self.marks and self.marks[-1][0] > shared:
            self.marks.pop()
        branches = self._branches(example, upcoming)
        needed = max(len(e.prompt) + e.room for e in (example, *(e for _, e in branches)))
        start = 0
        if self.reader is not None and self.marks and self.reader.max_tokens >= len(prompt) + example.room:
            start, mark = self.marks[-1]
            self.reader.rewind(mark)
        elif self.reader is not None and self.reader.max_tokens >= needed:
            self.marks = []
            self.reader.restart()
        else:
            self.marks, self.reader = [], None  # what it held is freed first
            self.reader = self.model.start(needed)
        at = start
        for border in sorted({border for border, _ in branches if border > start}):
            if border - at >= WORTH_SHARING:
                self.reader.read(prompt[at:border], progress)
                at = border
                self.marks.append((at, self.reader.mark()))
        self.reader.read(prompt[at:], progress)
        self.text = prompt
        return self.reader, len(prompt) - start

    def _branches(self, example: Example, upcoming: Sequence[Example]) -> list[tuple[int, Example]]:
        """How far each of the next examples goes along with this one; it ends with the first that does not."""
        found, shared = [], len(example.prompt) if self.model.shares else 0
        for later in upcoming:
            shared = min(shared, common_prefix(example.prompt, later.prompt))
            if shared < WORTH_SHARING:
                break
            found.append((shared, later))
        return found
