"""What `generate` writes, printed as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from oncelm.data.detokenize import text_stream

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Printer:
    """A streamer for `generate`: prints the text that tokens add to `prompt`, and keeps the time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self.text = text_stream(tokenizer, prompt)
        self.times: list[float] = []  # when generation started, and when each token came

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt [1, T], then with each token [1]."""
        self.times.append(time.perf_counter())
        if value.dim() == 1:
            for token in value.tolist():
                self._write(self.text.add(token))

    def end(self) -> None:
        """Called by `generate` after the last token."""
        self._write(self.text.end() + "\n")

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
