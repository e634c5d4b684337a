"""Log-probabilities of tokens, of a model's own logits: before temperature, penalties and masks, as vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from oncelm.engine.outputs import Logprob
from oncelm.engine.params import ALL
from oncelm.utils.device import send

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 256  # of a prompt's logits: 100 MB in float32, of 100,000 tokens


class Measured(NamedTuple):
    """Of rows of logits, on any device: the token of each, its log-probability, how many are likelier [M]; and those of
    the likeliest tokens, and their ids [M, K]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    best: torch.Tensor
    ids: torch.Tensor


def measure(logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> Measured:
    """Of each row of logits [M, V], for its token ([M] int64) and for as many as the largest of `counts`."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, tokens[:, None])
    ranks = (logits > chosen).sum(-1)
    vocab_size = logits.shape[1]
    width = max((vocab_size if count == ALL else min(count, vocab_size) for count in counts), default=0)
    ids = _likeliest(logits, width)
    best = logits.gather(1, ids)
    return Measured(tokens, (chosen - total)[:, 0], ranks, best - total, ids)


def _likeliest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids [M, count] of the largest of logits [M, V] float32, in order; of equal ones the lowest ids come first.

    `topk` by itself takes other ones of equal logits for another count, so a row would depend on its neighbours. So
    each logit becomes a whole number of the same order (its bits, those of negative ones turned round), and the id its
    last digits.
    """
    bits, last = (logits + 0.0).view(torch.int32).long(), logits.shape[1] - 1  # + 0.0: there is no -0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (order << 32) + torch.arange(last, -1, -1, device=logits.device)
    return last - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)


def tables(
    measured: Measured, counts: Sequence[int], tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[dict[int, Logprob]]:
    """Of each row: the log-probability of its token and of its `counts[i]` likeliest.

    A rank is 1 and the number of tokens that are likelier. The chosen token comes first, then the others by rank.
    """
    texts: dict[int, str | None] = {}

    def spelled(token: int) -> str | None:
        if token not in texts:
            texts[token] = None if tokenizer is None else tokenizer.decode([token])
        return texts[token]

    lists = (column.tolist() for column in measured)
    for token, logprob, rank, best_logprobs, best_tokens, count in zip(*lists, counts, strict=True):
        best_tokens = best_tokens if count == ALL else best_tokens[:count]
        found = {token: Logprob(logprob, rank + 1, spelled(token))}
        for place, (other, value) in enumerate(zip(best_tokens, best_logprobs, strict=False)):
            if not place or value != best_logprobs[place - 1]:
                rank = place + 1
            found.setdefault(other, Logprob(value, rank, spelled(other)))
        yield found


def prompt_logprobs(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: Sequence[int],
    count: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[int, Logprob]]:
    """Of each hidden state [P, d]: the log-probability of the token behind it (`targets`, P ids) and of the `count`
    likeliest ones (-1: all), from the logits `head(hidden)` [P, V], of which never more than a block is there.
    """
    found: list[dict[int, Logprob]] = []
    for start in range(0, len(hidden), ROWS_AT_ONCE):
        tokens = targets[start : start + ROWS_AT_ONCE]
        logits, counts = head(hidden[start : start + ROWS_AT_ONCE]), [count] * len(tokens)
        measured = measure(logits, send(list(tokens), torch.long, logits.device), counts)
        found += tables(measured, counts, tokenizer)
    return found
