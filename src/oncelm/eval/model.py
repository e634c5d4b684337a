"""A model under evaluation: its tokenizer's codec, and readers of one growing text each.

Tasks know nothing of caches. A reader reads, marks a place, returns to it, writes greedily, scores given tokens;
OnceLM's models and any other causal LM of transformers behave alike behind it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from oncelm.cache import YocoCache
from oncelm.data.encoding import Encoder
from oncelm.eval.examples import TokenScores
from oncelm.models.checks import fingerprint

LOGITS_AT_ONCE = 1 << 26  # elements alive while scoring: 256 MiB in float32
READ_AT_ONCE = 8192  # tokens, of models without a prefill of their own


class Codec:
    """A tokenizer as tasks need it: plain text to ids and back, special tokens apart.

    Attributes:
        prefix: ids that the tokenizer puts before a text (`<s>`), int32 [0 or more].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._encoder = Encoder(tokenizer)
        whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
        first = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.prefix = self._ids(whole[:first])

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


class LanguageModel:
    """A causal language model with its tokenizer.

    `cache_options` go to the `new_cache` of OnceLM's models (LongLLaMA: memory="cpu"), `read_options` to `prefill`.

    Attributes:
        name: for tables; also part of what a result file belongs to.
        longest: tokens of the longest text the model was made for; None where length is no matter.
        shares: whether a text may be read in parts without changing what the model makes of it. Not so in a LongLLaMA:
            what moves to memory depends on where a part ends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        cache_options: dict[str, Any] | None = None,
        read_options: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.name = model.eval(), name
        self.cache_options, self.read_options = cache_options or {}, read_options or {}
        config = model.config.get_text_config()
        self.codec = Codec(tokenizer, config.vocab_size)
        self.shares = not hasattr(config, "last_context_length")
        # a LongLLaMA's max_position_embeddings is the length of its windows
        self.longest: int | None = getattr(config, "max_position_embeddings", None) if self.shares else None

    def start(self, max_tokens: int) -> Reader:
        """A reader with room for `max_tokens` tokens."""
        if hasattr(self.model, "prefill") and hasattr(self.model, "new_cache"):
            return OnceReader(self.model, max_tokens, self.cache_options, self.read_options)
        return Reader(self.model, max_tokens)

    def describe(self) -> dict[str, Any]:
        """What results depend on, as plain JSON values."""
        config = self.model.config
        return {
            "name": self.name,
            "type": config.model_type,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights": self.model.fingerprint() if hasattr(self.model, "fingerprint") else fingerprint(self.model, ()),
            "tokenizer": self.codec.fingerprint(),
            **{key: getattr(config, key) for key in ("last_context_length", "mem_dtype") if hasattr(config, key)},
            **self.cache_options,
            **self.read_options,
        }


class Reader:
    """A model that reads one text, any causal LM of transformers: it keeps the model's own cache.

    Attributes:
        num_tokens: read so far.
        max_tokens: that there is room for.
    """

    def __init__(self, model: PreTrainedModel, max_tokens: int) -> None:
        self.model, self.max_tokens, self.num_tokens = model, max_tokens, 0
        self.cache: Any = None
        self._logits: torch.Tensor | None = None  # [1, V], behind the last token
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.read_options: dict[str, Any] = {}
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def read(self, ids: np.ndarray, progress: Callable[[int], object] | None = None) -> None:
        """Append ids [T]; `progress` is told the number of tokens read so far, now and then."""
        if len(ids):
            self._check_room(len(ids))
            self._logits = self._read(self._tensor(ids), progress)

    @torch.no_grad()
    def generate(
        self, max_new_tokens: int, is_complete: Callable[[list[int]], bool] = lambda ids: False, keep_end: bool = False
    ) -> list[int]:
        """Append the likeliest tokens, one by one, until one ends the text or `is_complete(ids)`.

        The one that ends the text is not read, and is left out of what is returned unless `keep_end`.
        """
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            token = int(self._last().argmax())
            if token in self._ends:
                return [*ids, token] if keep_end else ids
            ids.append(token)
            if len(ids) < max_new_tokens and is_complete(ids):
                break
            self._check_room(1)
            self._logits = self._forward(self._tensor([token]), keep=1)[-1:]
        return ids

    @torch.no_grad()
    def score(self, ids: np.ndarray, progress: Callable[[int], object] | None = None) -> TokenScores:
        """Append ids [T]: how likely each of them was. Logits exist for a block of positions at a time only."""
        self._check_room(len(ids))
        scores = TokenScores(np.empty(len(ids), np.float32), np.empty(len(ids), bool))
        size = self._scored_at_once()
        for start in range(0, len(ids), size):
            part = self._tensor(ids[start : start + size])
            logits = self._forward(part)
            targets = part[0]
            for row, rows in ((start, self._last()), (start + 1, logits[:-1])):
                if len(rows):
                    wanted = targets[row - start : row - start + len(rows)]
                    there = slice(row, row + len(rows))
                    scores.log_likelihoods[there] = (
                        -F.cross_entropy(rows.float(), wanted, reduction="none").cpu().numpy()
                    )
                    scores.greedy[there] = (rows.argmax(-1) == wanted).cpu().numpy()
            self._logits = logits[-1:].clone()
            if progress is not None:
                progress(self.num_tokens)
        return scores

    def restart(self) -> None:
        """Forget the text, to read another one."""
        self.num_tokens, self._logits = 0, None
        self._clear()

    def mark(self) -> Any:
        """This place in the text, to return to: as often as needed, but never forward over an earlier one."""
        return self.num_tokens, self._logits, self._save()

    def rewind(self, mark: Any) -> None:
        """Return to a mark."""
        num_tokens, self._logits, saved = mark
        self._load(saved, self.num_tokens - num_tokens)
        self.num_tokens = num_tokens

    # -- how transformers' caches do it -----------------------------------------------------------------------------

    def _read(self, ids: torch.Tensor, progress: Callable[[int], object] | None) -> torch.Tensor:
        for start in range(0, ids.shape[1], READ_AT_ONCE):
            logits = self._forward(ids[:, start : start + READ_AT_ONCE], keep=1)[-1:].clone()
            if progress is not None:
                progress(self.num_tokens)
        return logits

    def _save(self) -> Any:
        return None if keeps_every_token(self.cache) else copy.deepcopy(self.cache)

    def _load(self, saved: Any, tokens_after: int) -> None:
        if saved is not None:
            self.cache = copy.deepcopy(saved)
        elif tokens_after:
            self.cache.crop(-tokens_after)

    def _clear(self) -> None:
        self.cache = None

    def _scored_at_once(self) -> int:
        """Tokens of a block of `score`."""
        return max(1, min(LOGITS_AT_ONCE // self._last().shape[-1], READ_AT_ONCE))

    # -- common -----------------------------------------------------------------------------------------------------

    def _forward(self, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Append ids [1, t]: logits [t, V], or of the last `keep` tokens only where the model can leave the rest."""
        options = {"logits_to_keep": keep} if self._keeps else {}
        output = self.model(ids, past_key_values=self.cache, use_cache=True, **options, **self.read_options)
        self.cache = output.past_key_values
        self.num_tokens += ids.shape[1]
        return output.logits[0]

    def _last(self) -> torch.Tensor:
        if self._logits is None:
            raise ValueError("nothing has been read yet: a model predicts only what follows at least one token.")
        return self._logits

    def _tensor(self, ids: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(ids, dtype=np.int64))[None].to(self.model.device)

    def _check_room(self, count: int) -> None:
        if self.num_tokens + count > self.max_tokens:
            raise ValueError(f"a reader of {self.max_tokens} tokens has {self.num_tokens}; {count} more do not fit.")


class OnceReader(Reader):
    """The same for a model with a preallocated cache: prefill in chunks with early exit, rewind points."""

    def __init__(
        self, model: PreTrainedModel, max_tokens: int, cache_options: dict[str, Any], read_options: dict[str, Any]
    ) -> None:
        super().__init__(model, max_tokens)
        self.cache_options, self.read_options = cache_options, read_options
        # What a LongLLaMA moves to memory depends on where a block ends, so that its blocks are its windows.
        self._window = model.config.max_position_embeddings if hasattr(model.config, "last_context_length") else None
        self._clear()

    def _read(self, ids: torch.Tensor, progress: Callable[[int], object] | None) -> torch.Tensor:
        before = self.num_tokens
        report = None if progress is None else lambda done: progress(before + done)
        logits = self.model.prefill(ids, self.cache, progress=report, **self.read_options)
        self.num_tokens += ids.shape[1]
        return logits

    def _scored_at_once(self) -> int:
        return self._window or super()._scored_at_once()

    def _save(self) -> Any:
        # a rewind point copies no shared K/V: they stay where they are, and what follows overwrites them
        return self.cache.snapshot(shared=False) if isinstance(self.cache, YocoCache) else copy.deepcopy(self.cache)

    def _load(self, saved: Any, tokens_after: int) -> None:
        if isinstance(self.cache, YocoCache):
            self.cache.restore(saved)
        else:
            self.cache = copy.deepcopy(saved)

    def _clear(self) -> None:
        if isinstance(self.cache, YocoCache):  # its memory, and what is recorded to decode in it, stay
            self.cache.reset()
        else:
            self.cache = None  # freed before there is another one
            self.cache = self.model.new_cache(1, self.max_tokens, **self.cache_options)


def keeps_every_token(cache: Any) -> bool:
    """Whether a cache is nothing but keys and values of every token, so that its end can be cut off."""
    return type(cache) is DynamicCache and all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements two vectors share."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
