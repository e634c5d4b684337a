"""An answer, token by token: its text, and where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from oncelm.data.detokenize import text_stream
from oncelm.engine.params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from oncelm.engine.structured import Grammar


class TextState:
    """Text that is certain, and why the answer ends.

    What comes out joins to the text that all tokens add to the prompt, cut before a stop string. A character comes out
    whole, and what may be the beginning of a stop string is held back until that is known.

    Args:
        tokenizer: None: no text.
        eos_token_ids: tokens that end a text.
        max_tokens: tokens of the answer at most; None: as the parameters say.
        grammar: the structure of the answer. It goes on with each token.

    Attributes:
        text: all that came out.
        num_tokens: of the answer so far.
        is_silent: nothing comes out, and nothing in the answer's text or structure ends it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_token_ids: Collection[int] = (),
        max_tokens: int | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self._params, self._grammar = params, grammar
        self._max_tokens = params.max_tokens if max_tokens is None else max_tokens
        self._ends = {*(() if params.ignore_eos else eos_token_ids)}
        self._stop_tokens = {*(params.stop_token_ids or ())}
        self._stream = (
            text_stream(tokenizer, prompt_ids, skip_special_tokens=params.skip_special_tokens)
            if tokenizer is not None and params.detokenize
            else None
        )
        self.is_silent = self._stream is None and grammar is None and not params.stop
        self._held = ""
        self.text, self.num_tokens = "", 0

    def append(self, token: int) -> tuple[str | None, str | None, int | str | None]:
        """The text that is certain with a token (None: none is made), and finish_reason and stop_reason as in
        `CompletionOutput`.
        """
        self.num_tokens += 1
        finish, stop = self._ending(token)
        if self._stream is None:
            return None, finish, stop
        is_cut = token in self._ends or token in self._stop_tokens
        piece = "" if is_cut and not self._params.include_stop_str_in_output else self._stream.add(token)
        if finish is not None:
            piece += self._stream.end()
        earlier = len(self._held)
        self._held += piece
        found = self._find_stop(earlier) if self.num_tokens > self._params.min_tokens else None
        if found is not None:
            cut, text = found
            return self._give(cut), "stop", text
        kept = 0 if finish is not None else self._undecided()
        return self._give(len(self._held) - kept), finish, stop

    def end(self) -> str:
        """What was held back, once no token follows."""
        self._held += "" if self._stream is None else self._stream.end()
        return self._give(len(self._held))

    def _ending(self, token: int) -> tuple[str | None, int | None]:
        """finish_reason and stop_reason, but for stop strings."""
        if self._grammar is not None:
            self._grammar.accept(token)
        if token in self._ends:
            return "stop", None
        if token in self._stop_tokens:
            return "stop", token
        if self._grammar is not None and self._grammar.finished:
            return "stop", None
        return ("length" if self.num_tokens == self._max_tokens else None), None

    def _find_stop(self, earlier: int) -> tuple[int, str] | None:
        """Where to cut, and the first stop string that ends behind `earlier` characters of what is held."""
        found = []
        for text in self._params.stop or ():
            start = self._held.find(text, max(0, earlier - len(text) + 1))
            if start >= 0:
                found.append((start + len(text), start, text))
        if not found:
            return None
        end, start, text = min(found)  # whatever the tokens are, the one that is complete first
        return end if self._params.include_stop_str_in_output else start, text

    def _undecided(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max((_overlap(self._held, text) for text in self._params.stop or ()), default=0)

    def _give(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of a text that are a beginning of a stop string, not all of it."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
