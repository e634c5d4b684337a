"""Token ids to text, one token at a time: what a stream prints is the text of the whole.

How a token reads depends on the ones before it (bytes of one character; a space that only shows between words), so the
last ones are decoded again with every new one, and what they add is given out. `DecodeStream` of tokenizers and
`TextStreamer` of transformers do the same without the prompt's end in view, or raise where a run of byte tokens breaks.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = "\ufffd"  # how bytes that are no character (yet) read
# how the tokens of that character itself are spelled, where a text has it: byte-level, as byte tokens, as text
SPELLED_UNKNOWN = ("\u00ef\u00bf\u00bd", "<0xEF><0xBF><0xBD>", UNKNOWN)
LONGEST_TAIL = 3  # tokens at the end of a text that may be the beginning of one character, of up to four bytes
CONTEXT = 8  # tokens before a new one that are decoded with it, at least, where there are as many
MOST_PENDING = 64  # tokens that are held back: more of them are bytes of no character, not the beginning of one


class Stream(Protocol):
    """The text that tokens add behind a prompt, token by token.

    A character comes out whole, with its last byte; bytes that never become one come out as U+FFFD, and so does the
    character that is cut off at the end. Where the prompt itself ends within a character, that character is part of
    what comes out.
    """

    def add(self, token: int) -> str:
        """The text that is certain with this token, often empty."""

    def end(self) -> str:
        """What is left, once no token follows."""


def text_stream(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
) -> Stream:
    """A stream of the text that tokens add behind `prompt`: the fastest that there is for a tokenizer."""
    kind = ByteStream if is_byte_level(tokenizer) else TextStream
    return kind(tokenizer, prompt, skip_special_tokens=skip_special_tokens)


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each token stands for bytes, whatever is beside it: byte-level BPE, as GPT-2's, Llama 3's, Qwen's."""
    from tokenizers.decoders import ByteLevel

    return isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None), ByteLevel)


class ByteStream:
    """`Stream` of a byte-level tokenizer: the bytes of each token, through Python's incremental decoder of UTF-8.

    A tenth of the time of decoding tokens again (1 us a token).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._table = _TABLES.setdefault(tokenizer, ({}, {}))[skip_special_tokens]
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_empty = True
        tail = b""
        for token in reversed(prompt):
            if len(tail) >= LONGEST_TAIL:
                break
            tail = self._bytes(token) + tail
        self._decoder.decode(tail)  # it keeps the beginning of a character at the end

    def add(self, token: int) -> str:
        self._is_empty = False
        return self._decoder.decode(self._bytes(token))

    def end(self) -> str:
        return "" if self._is_empty else self._decoder.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        found = self._table.get(token)
        if found is None:
            found = self._table[token] = _bytes_of(self._tokenizer, token, self._skip_special_tokens)
        return found


# by tokenizer: the bytes of the tokens that came so far, with special tokens and without
_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[dict[int, bytes], dict[int, bytes]]] = WeakKeyDictionary()


def _bytes_of(tokenizer: PreTrainedTokenizerBase, token: int, skip_special_tokens: bool) -> bytes:
    added = tokenizer.added_tokens_decoder.get(token)
    if added is not None and added.special and skip_special_tokens:
        return b""
    name = tokenizer.backend_tokenizer.id_to_token(token)
    if name is None:
        return b""
    byte_of = _byte_of_character()
    # one that was added may be text as it is
    return bytes(map(byte_of.__getitem__, name)) if byte_of.keys() >= set(name) else name.encode()


def byte_characters() -> list[str]:
    """The visible character that stands for each byte, 0 to 255, in a byte-level vocabulary.

    Bytes that print as themselves in Latin-1 do so; the others take the code points from 256 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


@cache
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


class TextStream:
    """`Stream` of any tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        context = self._settled_end(list(prompt))
        whole = len(context) - self._unfinished(context)
        self._context, self._pending = context[:whole], context[whole:]
        self._of_prompt = len(self._pending)
        # a token may be a space and half a character: the prompt has shown the space
        self._shown = self._added().rstrip(UNKNOWN)

    def add(self, token: int) -> str:
        self._pending.append(token)
        text, certain = self._added(), len(self._pending)
        if text.endswith(UNKNOWN):
            if certain <= MOST_PENDING:
                return ""
            certain -= LONGEST_TAIL
            text = self._added(certain)
        return self._give(text, certain) if text else ""

    def end(self) -> str:
        count = len(self._pending)
        return self._give(self._added(), count) if count > self._of_prompt else ""

    def _give(self, text: str, count: int) -> str:
        """`text`, which the first `count` pending tokens add, without what was shown of it."""
        self._context, self._pending = self._pending[:count] or self._context, self._pending[count:]
        text, self._shown, self._of_prompt = text.removeprefix(self._shown), "", 0
        return text

    def _added(self, count: int | None = None) -> str:
        """What the first `count` pending tokens (all) add to the text of the context."""
        pending = self._pending[:count]
        before, text = self._decode(self._context), self._decode(self._context + pending)
        if text.startswith(before):
            return text[len(before) :]
        return self._decode(pending)  # one broken byte makes all of its run unknown, characters that are out too

    def _settled_end(self, prompt: list[int]) -> list[int]:
        """The last tokens of the prompt, from one that begins with a character on: they read as in the whole prompt."""
        count = CONTEXT
        while count < len(prompt):
            for start in range(len(prompt) - count, max(len(prompt) - count - LONGEST_TAIL, 0) - 1, -1):
                text = self._decode(prompt[start:])
                if text.strip() and not text.startswith(UNKNOWN):
                    return prompt[start:]
            count *= 2
        return prompt

    def _unfinished(self, context: list[int]) -> int:
        """How many tokens at the end are the beginning of a character."""
        for tail in range(min(LONGEST_TAIL, len(context)) + 1):
            if self._ends_whole(context[: len(context) - tail]):
                return tail
        return 0

    def _ends_whole(self, ids: list[int]) -> bool:
        """Whether the last token ends a character."""
        if not self._decode(ids).endswith(UNKNOWN):
            return True
        return "".join(self._tokenizer.convert_ids_to_tokens(ids[-LONGEST_TAIL:])).endswith(SPELLED_UNKNOWN)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
