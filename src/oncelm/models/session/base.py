"""What every session shares, with any cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

READ_AT_ONCE = 8192  # tokens of a row, of models that do not choose by themselves


class Session(ABC):
    """A model and the N texts that it has read so far.

    Args:
        model: any causal language model, in evaluation mode.
        rows: N.
        room: tokens of each row at most; None: as many as come.
        chunk_size: tokens of a row that `read` reads at a time; None leaves the choice to the model.

    Attributes:
        cache: what the model remembers; None while nothing has been read.
        num_tokens: of the longest row.
        branches: whether rows of different lengths are read on, so that what texts begin with is read once for all.
            Otherwise `score` takes whole texts only, unless there is one row and all its logits are wanted.
        longest: tokens of the longest text that such a `score` takes; None: any.
        window: tokens that should be read at once, where it matters (Family.reads_by_windows); else None.
    """

    branches: bool
    longest: int | None
    window: int | None = None

    def __init__(
        self, model: PreTrainedModel, rows: int = 1, room: int | None = None, chunk_size: int | None = None
    ) -> None:
        self.model: Any = model
        self.rows, self.room, self.chunk_size = rows, room, chunk_size
        self.cache: Any = None

    @property
    @abstractmethod
    def num_tokens(self) -> int: ...

    @abstractmethod
    def read(self, ids: torch.Tensor, progress: Callable[[int], object] | None = None) -> torch.Tensor:
        """Append ids [N, T] in chunks: logits [N, V] behind each row's last token.

        `progress` is told the tokens of a row read so far, now and then.
        """

    @abstractmethod
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [N, 1]: logits [N, V]."""

    @abstractmethod
    def score(self, texts: Sequence[torch.Tensor], wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Append to each row its own text, N vectors [T_n], in one forward pass.

        Returns:
            Logits [count, V], each of what follows a token that is `wanted`: a mask over all texts' tokens, one text
            behind the other, bool [sum of T_n]; None means all.
        """

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order, with repeats."""

    @abstractmethod
    def mark(self) -> Any:
        """This place, to return to: as often as needed, not over a `select`, and never forward over an earlier mark."""

    @abstractmethod
    def rewind(self, mark: Any) -> None:
        """Return to a mark."""

    @abstractmethod
    def bytes_of(self, tokens: int) -> int:
        """Bytes that a row of so many tokens leaves behind `score`; 0 where rows do not branch, which leaves none."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the cache, as it is."""

    def open(self) -> Any:
        """The cache, made now where that can be done before anything is read."""
        return self.cache

    def generate(self, ids: torch.Tensor, **options: Any) -> Any:
        """Hugging Face's `generate` from here, as the last call of a session: what it returns.

        Args:
            ids: [N, T] the texts or their ends, of which the session has read all but the last token, or nothing.
            options: for `generate`.
        """
        cache = self.open()
        if cache is not None:
            # a mask longer than the ids tells generate that the cache holds what came before them
            mask = ids.new_ones(len(ids), max(self.num_tokens + 1, ids.shape[1]))
            options |= {"past_key_values": cache, "attention_mask": mask}
        output = self.model.generate(ids, **options)
        self.cache = getattr(output, "past_key_values", cache)
        return output

    def free(self) -> None:
        """Forget the texts, and give their memory back."""
        self.cache = None

    def reset(self) -> None:
        """Forget the texts, to read others; memory is kept where the model knows how."""
        self.free()

    def start(self, rows: int, room: int | None) -> None:
        """Begin with other numbers of rows and tokens."""
        self.free()
        self.rows, self.room = rows, room

    def _check_room(self, count: int) -> None:
        if self.room is not None and self.num_tokens + count > self.room:
            raise ValueError(
                f"a session with room for {self.room} tokens has {self.num_tokens}; {count} more do not fit."
            )

    def _check_rows(self, ids: torch.Tensor) -> None:
        if ids.dim() != 2 or len(ids) != self.rows or not ids.shape[1]:
            raise ValueError(f"a session of {self.rows} rows takes ids [{self.rows}, T], got {list(ids.shape)}.")

    def _check_read(self) -> None:
        if self.cache is None:
            raise ValueError(
                "this session has read nothing yet: its rows begin alike, there is nothing to choose from."
            )

    def _check_whole(self, texts: Sequence[torch.Tensor]) -> None:
        """ValueError unless texts may be scored by a session whose rows do not branch."""
        longest = max(map(len, texts))
        if self.num_tokens or (self.longest is not None and longest > self.longest):
            raise ValueError(
                f"{type(self.model).__name__} scores rows of whole texts only, of at most {self.longest} tokens; got "
                f"{longest} behind {self.num_tokens}."
            )


def pad(texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [T_n] as rows padded on the right: ids [N, T] and which of them are tokens, bool [N, T], on the CPU."""
    lengths = torch.tensor([len(text) for text in texts])[:, None]
    real = torch.arange(int(lengths.max())) < lengths
    ids = torch.zeros(real.shape, dtype=torch.long)
    ids[real] = torch.cat([text.cpu() for text in texts]).long()
    return ids, real
