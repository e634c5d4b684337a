"""Text to token ids at the tokenizer library's own speed, long texts in pieces that give the same tokens.

A text of tens of megabytes, encoded at once, takes gigabytes. It is cut where no token spans the cut. That is
tested at every cut: the text around it must give the same ids whole and cut.

Text without such a place for `_FARTHEST` characters (a file of nothing but letters, or of spaces) is cut all the same,
so that memory and time stay bounded: there ids may differ from those of the whole, and a warning says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LONG_TEXT = 1 << 18  # characters; a longer text is cut
PIECE_CHARACTERS = 1 << 17  # of a cut text, at least
# Where a cut is tried, best first: after a line, before a word, behind punctuation.
_CUTS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\w)(?= \w)"), re.compile(r"(?<=[^\w\s])(?=\w)"))
_FARTHEST = 1 << 19  # characters in which a cut is looked for at all
_SEARCH = 1 << 16  # characters in which a cut is looked for, with ...
_TRIES = 8  # ... so many tries of a kind, each of ...
_WINDOW = 200  # ... so many characters to either side
# A piece that is not a text's first is encoded behind a line break whose ids are dropped: some tokenizers put
# a mark or a space before the start of a text, and a piece's start is none.
_ANCHOR = "\n"
_OTHER_ANCHORS = (".", "a", "0")  # behind a forced cut, where a line break may become one token with what follows
_CLOSE = 64  # characters in which a forced cut is tried, too


class Encoder:
    """A tokenizer as a function from texts to ids, without special tokens around them.

    Text that spells a special token stays text; with `special_tokens` it becomes that token.

    Many threads may call it at once: the Rust library works outside of Python's lock.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: bool = False) -> None:
        self.tokenizer, self.special_tokens = tokenizer, special_tokens
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = Tokenizer.from_str(backend.to_str()) if isinstance(backend, Tokenizer) else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = not special_tokens
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1  # ids are below it
        self._anchor = self.encode([_ANCHOR])[0]
        self._has_warned = False

    def encode(self, texts: Sequence[str]) -> list[array[int]]:
        """The ids of each text, 32 bits each."""
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [array("I", encoding.ids) for encoding in encodings]
        options = {"split_special_tokens": not self.special_tokens, "verbose": False}
        return [
            array("I", ids) for ids in self.tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]
        ]

    def encode_long(self, parts: Iterable[str]) -> Iterator[array[int]]:
        """The ids of one text that comes in parts: together, those of the whole text at once (but see above)."""
        for text, continued in self.pieces(parts):
            yield self.encode_piece(text, continued)

    def pieces(self, parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """What `encode_piece` takes for one text that comes in parts: its pieces, and whether each goes on with it."""
        text, start, continued = "", 0, False  # `text` is given out up to `start`
        for part in parts:
            tried = len(text) - _WINDOW  # no cut was found before
            text, tried, start = text[start:] + part, tried - start, 0
            while len(text) - start >= LONG_TEXT:
                end = min(len(text), start + _FARTHEST)
                cut = self._find_cut(text, max(tried, start + PIECE_CHARACTERS), end)
                if cut is None:
                    tried = max(tried, end - _WINDOW)
                    if end - start < _FARTHEST:
                        break
                    cut = self._force_cut(text, start + PIECE_CHARACTERS)
                yield text[start:cut], continued
                start, continued = cut, True
        if start < len(text):
            yield text[start:], continued

    def encode_piece(self, text: str, continued: bool) -> array[int]:
        """The ids of one of `pieces`."""
        if not continued:
            return self.encode([text])[0]
        ids = self.encode([_ANCHOR + text])[0]
        if ids[: len(self._anchor)] == self._anchor:
            return ids[len(self._anchor) :]
        for other in _OTHER_ANCHORS:
            anchor, ids = self.encode([other, other + text])
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self.encode([text])[0]

    def fingerprint(self) -> str:
        """What the ids depend on, as a checksum: tokenizers with the same one give the same ids."""
        if self._backend is not None:
            inner = self._backend.to_str()
        else:
            inner = json.dumps([type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())])
        special = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return hashlib.sha256(f"{special} {inner}".encode()).hexdigest()

    def _force_cut(self, text: str, start: int) -> int:
        """A place to cut at `start`, or close behind it where the tokens around show no difference."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a text has no place to cut it in %s characters (%r ...): it is cut anyway, which may change a token",
                f"{_FARTHEST:,}",
                text[start : start + 20],
            )
        return next((cut for cut in range(start, start + _CLOSE) if self._is_safe(text, cut)), start)

    def _find_cut(self, text: str, start: int, end: int) -> int | None:
        """The first place between `start` and `end` where cutting changes no token."""
        for low in range(start, end - _WINDOW, _SEARCH):
            high = min(low + _SEARCH, end - _WINDOW)
            for pattern in _CUTS:
                for match in islice(pattern.finditer(text, low, high), _TRIES):
                    if self._is_safe(text, match.end()):
                        return match.end()
        return None

    def _is_safe(self, text: str, cut: int) -> bool:
        left, right = text[max(0, cut - _WINDOW) : cut], text[cut : cut + _WINDOW]
        whole, first, second = self.encode([left + right, left, _ANCHOR + right])
        anchor = len(self._anchor)
        return second[:anchor] == self._anchor and whole == first + second[anchor:]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool | None = None, is_start: bool = True
) -> list[int]:
    """The ids that `tokenizer(text)` gives, of a long text in pieces.

    Args:
        special_tokens: whether what spells a special token becomes that token; None means as the tokenizer does it.
        is_start: whether the text begins here: some tokenizers put a mark before it.
    """
    split = tokenizer.split_special_tokens if special_tokens is None else not special_tokens
    if len(text) < LONG_TEXT:
        return tokenizer(text, add_special_tokens=is_start, split_special_tokens=split, verbose=False).input_ids
    before, after = marks_around(tokenizer) if is_start else ([], [])
    pieces = Encoder(tokenizer, special_tokens=not split).encode_long([text])
    return [*before, *chain.from_iterable(pieces), *after]


def marks_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before a text (`<s>`), and behind it."""
    whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    first = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:first], whole[first + len(plain) :]
