"""A tokenizer as tasks need it: plain text to ids and back, special tokens apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from oncelm.data.encoding import Encoder, marks_around


class Codec:
    """A tokenizer as tasks need it: plain text to ids and back, special tokens apart.

    Attributes:
        prefix: ids that the tokenizer puts before a text (`<s>`), int32 [0 or more].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._encoder = Encoder(tokenizer)
        self.prefix = self._ids(marks_around(tokenizer)[0])

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without special tokens, int32 [T]; text that spells one stays text."""
        return self._ids(self._encoder.encode([text])[0])

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many ids each text has, without special tokens."""
        return [len(self._ids(ids)) for ids in self._encoder.encode(texts)]

    def stream(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of one long text that comes in parts, a piece at a time; those of the whole text at once."""
        for ids in self._encoder.encode_long(parts):
            yield self._ids(ids)

    def pair(self, before: str, after: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of `before + after`, cut where `after` begins (a token across the border counts as `after`'s)."""
        whole, head = self.encode(before + after), self.encode(before)
        cut = common_prefix(whole, head)
        return whole[:cut], whole[cut:]

    def decode(self, ids: Iterable[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def check(self, text: str, what: str) -> None:
        """ValueError unless the text survives encoding and decoding (white space at its ends aside)."""
        back = self.decode(self.encode(text))
        if back.strip() != text.strip():
            raise ValueError(f"the tokenizer cannot encode {what}: {text!r} comes back as {back!r}.")

    def fingerprint(self) -> str:
        """A short hash of what ids depend on."""
        return self._encoder.fingerprint()[:16]

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {max(ids)}, but the model knows {self.vocab_size} tokens only; "
                "name the tokenizer it was trained with."
            )
        return np.array(ids, dtype=np.int32)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements two vectors share."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
