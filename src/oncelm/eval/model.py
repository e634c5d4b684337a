"""A model under evaluation, and readers of one growing text each.

Tasks know nothing of caches. A reader reads, marks a place, returns to it, writes greedily, scores given tokens; what
drives the model below it is a session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oncelm.eval.codec import Codec
from oncelm.eval.examples import TokenScores
from oncelm.models.checks import fingerprint
from oncelm.models.registry import family
from oncelm.models.session import READ_AT_ONCE, Session, open_session

LOGITS_AT_ONCE = 1 << 26  # elements alive while scoring: 256 MiB in float32


class LanguageModel:
    """A causal language model with its tokenizer.

    `cache_options` and `read_options` are those of its session (LongLLaMA: memory="cpu"; last_context_length=512).

    Attributes:
        name: for tables; also part of what a result file belongs to.
        longest: tokens of the longest text the model was made for; None where length is no matter.
        shares: whether a text may be read in parts without changing what the model makes of it.
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
        self.family, config = family(model.config), model.config.get_text_config()
        self.codec = Codec(tokenizer, config.vocab_size)
        self.shares = not self.family.reads_by_windows
        # of a model that reads by windows it is the length of these
        self.longest: int | None = getattr(config, "max_position_embeddings", None) if self.shares else None

    def session(self, rows: int = 1, room: int | None = None) -> Session:
        """A session of `rows` texts, with room for `room` tokens each."""
        return open_session(self.model, rows, room, cache_options=self.cache_options, read_options=self.read_options)

    def start(self, max_tokens: int) -> Reader:
        """A reader with room for `max_tokens` tokens."""
        return Reader(self.session(1, max_tokens))

    def describe(self) -> dict[str, Any]:
        """What results depend on, as plain JSON values."""
        config, model = self.model.config, self.model
        cache = dict(self.cache_options)
        if (kept := cache.pop("dtype", None)) is not None:
            cache["kv_dtype"] = str(kept).removeprefix("torch.")
        return {
            "name": self.name,
            "type": config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": model.fingerprint() if self.family.has_own_cache else fingerprint(model, ()),
            "tokenizer": self.codec.fingerprint(),
            **{key: getattr(config, key) for key in self.family.result_keys},
            **cache,
            **self.read_options,
        }


class Reader:
    """A model that reads one text.

    Attributes:
        num_tokens: read so far.
        max_tokens: that there is room for.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._logits: torch.Tensor | None = None  # [1, V], behind the last token
        generation = session.model.generation_config
        ends = None if generation is None else generation.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    @property
    def num_tokens(self) -> int:
        return self.session.num_tokens

    @property
    def max_tokens(self) -> int:
        assert self.session.room is not None
        return self.session.room

    def read(self, ids: np.ndarray, progress: Callable[[int], object] | None = None) -> None:
        """Append ids [T]; `progress` is told the number of tokens read so far, now and then."""
        if len(ids):
            self._logits = self.session.read(as_tensor(ids)[None], progress)

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
            self._logits = self.session.step(torch.tensor([[token]]))
        return ids

    def score(self, ids: np.ndarray, progress: Callable[[int], object] | None = None) -> TokenScores:
        """Append ids [T]: how likely each of them was. Logits exist for a block of positions at a time only."""
        scores = TokenScores(np.empty(len(ids), np.float32), np.empty(len(ids), bool))
        size = self.session.window or max(1, min(LOGITS_AT_ONCE // self._last().shape[-1], READ_AT_ONCE))
        for start in range(0, len(ids), size):
            part = as_tensor(ids[start : start + size])
            logits = self.session.score([part])
            targets = part.to(logits.device)
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
        self._logits = None
        self.session.reset()

    def mark(self) -> Any:
        """This place in the text, to return to: as often as needed, but never forward over an earlier one."""
        return self._logits, self.session.mark()

    def rewind(self, mark: Any) -> None:
        """Return to a mark."""
        self._logits, place = mark
        self.session.rewind(place)

    def _last(self) -> torch.Tensor:
        if self._logits is None:
            raise ValueError("nothing has been read yet: a model predicts only what follows at least one token.")
        return self._logits


def as_tensor(ids: np.ndarray) -> torch.Tensor:
    """Token ids [T] for a session, int64."""
    return torch.from_numpy(ids.astype(np.int64))
