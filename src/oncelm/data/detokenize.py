"""Token ids to text, one token at a time: what a stream prints is the text of the whole.

How a token reads depends on the ones before it (bytes of one character; a space that only shows between words), so the
last ones are decoded again with every new one, and what they add is given out. `DecodeStream` of tokenizers and
`TextStreamer` of transformers do the same without the prompt's end in view, or raise where a run of byte tokens breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = "\ufffd"  # how bytes that are no character (yet) read
# how the tokens of that character itself are spelled, where a text has it: byte-level, as byte tokens, as text
SPELLED_UNKNOWN = ("\u00ef\u00bf\u00bd", "<0xEF><0xBF><0xBD>", UNKNOWN)
LONGEST_TAIL = 3  # tokens at the end of a text that may be the beginning of one character, of up to four bytes
CONTEXT = 8  # tokens before a new one that are decoded with it, at least, where there are as many
MOST_PENDING = 64  # tokens that are held back: more of them are bytes of no character, not the beginning of one


class TextStream:
    """The text that tokens add behind `prompt`, token by token.

    A character comes out whole, with its last byte; bytes that never become one come out as U+FFFD, and so does the
    character that is cut off at the end. Where the prompt itself ends within a character, that character is part of
    what comes out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        context = self._settled_end(list(prompt))
        whole = len(context) - self._unfinished(context)
        self._context, self._pending = context[:whole], context[whole:]
        self._of_prompt = len(self._pending)
        # a token may be a space and half a character: the prompt has shown the space
        self._shown = self._added().rstrip(UNKNOWN)

    def add(self, token: int) -> str:
        """The text that is certain with this token, often empty."""
        self._pending.append(token)
        text, certain = self._added(), len(self._pending)
        if text.endswith(UNKNOWN):
            if certain <= MOST_PENDING:
                return ""
            certain -= LONGEST_TAIL
            text = self._added(certain)
        return self._give(text, certain) if text else ""

    def end(self) -> str:
        """What is left, once no token follows."""
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
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
