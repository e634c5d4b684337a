"""How likely a model finds given continuations of given contexts, many at a time.

Requests of similar length make a batch; within it they are laid out as a tree, and what several of them begin with
(few-shot examples, a question with its choices) is read once. A batch is computed level by level; going down a level
repeats the rows of the cache. Logits exist for the positions whose next token is scored, for no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from oncelm.eval.codec import common_prefix
from oncelm.eval.examples import Score
from oncelm.eval.harness.tree import Request, level_targets, single_level, tree_levels
from oncelm.eval.model import LanguageModel, as_tensor
from oncelm.eval.prefix import WORTH_SHARING, PrefixReader
from oncelm.eval.runner import LOOK_AHEAD
from oncelm.models.session import Session

TOKENS_AT_ONCE = 1 << 14  # read in a batch, padding included, about
LOGITS_AT_ONCE = 1 << 27  # elements alive: 512 MiB in float32
CACHE_AT_ONCE = 1 << 31  # bytes of the rows of a level's cache

Answer = tuple[float, bool]  # summed natural log-likelihood; whether greedy decoding would write this continuation


@dataclass
class Budget:
    """What a batch may hold at most."""

    tokens: int  # of padded rows
    targets: int
    rows: int

    def halve(self, rows: int) -> None:
        """Of a batch of so many rows, which was too large."""
        halves = (self.tokens // 2, self.targets // 2, min(rows, self.rows) // 2)
        self.tokens, self.targets, self.rows = (max(1, half) for half in halves)


@torch.no_grad()
def score_requests(
    model: LanguageModel,
    session: Session,
    requests: Sequence[Request],
    progress: Callable[[int], object] = lambda count: None,
) -> list[Answer]:
    """The answers of a session of `model`, in the requests' order. `progress` is told how many more are done, now and
    then.

    A batch that does not fit in the device's memory is tried again as halves, and later batches are smaller.
    """
    targets = max(1, LOGITS_AT_ONCE // model.model.config.get_text_config().vocab_size)
    batched: list[int] = []
    apart: list[int] = []  # too long for a row
    for i, request in enumerate(requests):
        fits = session.longest is None or (
            len(request.read) <= session.longest and len(request.continuation) <= targets
        )
        (batched if fits else apart).append(i)
    batched.sort(key=lambda i: (-_size(requests[i], session.branches), requests[i].place))
    apart.sort(key=lambda i: requests[i].place)
    found: list[Answer] = [(0.0, False)] * len(requests)
    for order, answers in (
        (batched, _score_batches(session, [requests[i] for i in batched], targets)),
        (apart, _score_one_by_one(model, [requests[i] for i in apart])),
    ):
        places = iter(order)
        for part in answers:
            for answer in part:
                found[next(places)] = answer
            progress(len(part))
    return found


def _score_one_by_one(model: LanguageModel, requests: Sequence[Request]) -> Iterator[list[Answer]]:
    """Sorted requests through one reader, which reads long texts in parts."""
    prefix = PrefixReader(model)
    examples = [Score(request.context, request.continuation) for request in requests]
    for i, example in enumerate(examples):
        reader, _ = prefix.read(example, examples[i + 1 : i + 1 + LOOK_AHEAD])
        scores = reader.score(example.continuation)
        yield [(float(scores.log_likelihoods.sum(dtype=np.float64)), bool(scores.greedy.all()))]


# -- batches ----------------------------------------------------------------------------------------------------------


def _size(request: Request, branches: bool) -> int:
    """Of the row that is read first: rows of one size, up to a fifth shorter than each other, go side by side."""
    alone = not branches or len(request.context) < WORTH_SHARING
    return int(4 * math.log2(len(request.read if alone else request.context)))


def _score_batches(session: Session, requests: Sequence[Request], targets: int) -> Iterator[list[Answer]]:
    """Answers of ordered requests, a batch at a time."""
    if not requests:
        return
    longest = max(len(request.read) for request in requests)
    budget = Budget(TOKENS_AT_ONCE, targets, max(1, CACHE_AT_ONCE // max(1, session.bytes_of(longest))))
    shared = [0] * len(requests)  # with the request before, as far as it is not read again
    if session.branches:
        shared[1:] = [common_prefix(a.read, b.read) for a, b in pairwise(requests)]
    start = 0
    while start < len(requests):
        end = _batch_end(requests, shared, start, budget)
        batch = sorted(range(start, end), key=lambda i: requests[i].place)
        try:
            answers = _score_batch(session, [requests[i] for i in batch], budget.targets)
        except torch.OutOfMemoryError:
            if end - start == 1:
                raise
            answers = None
        if answers is None:  # out of the handler, whose traceback keeps the batch alive
            session.free()
            torch.cuda.empty_cache()
            budget.halve(end - start)
            continue
        by_place = dict(zip(batch, answers, strict=True))
        yield [by_place[i] for i in range(start, end)]
        start = end


def _batch_end(requests: Sequence[Request], shared: Sequence[int], start: int, budget: Budget) -> int:
    """Where a batch from `start` on ends.

    It is moved back, within the batch's second half, to where the fewest tokens are shared across it.
    """
    counts, widths = [0, 0], [0, 0]  # of rows that read a text from its beginning, and of those that go on from another
    targets, end = 0, start
    while end < len(requests):
        goes_on = end > start and shared[end] >= WORTH_SHARING
        counts[goes_on] += 1
        widths[goes_on] = max(widths[goes_on], len(requests[end].read) - (shared[end] if goes_on else 0))
        targets += len(requests[end].continuation)
        tokens = counts[0] * widths[0] + counts[1] * widths[1]
        if end > start and (tokens > budget.tokens or targets > budget.targets or sum(counts) > budget.rows):
            break
        end += 1
    middle = (start + end) // 2 + 1
    if end == len(requests) or middle > end:
        return end
    return min(range(end, middle - 1, -1), key=lambda i: shared[i])


def _score_batch(session: Session, requests: Sequence[Request], targets_at_once: int) -> list[Answer]:
    """Answers of requests sorted by their tokens."""
    levels = tree_levels(requests, targets_at_once) if session.branches else single_level(requests)
    totals = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.ones(len(requests), dtype=torch.bool)
    session.start(len(levels[0]), sum(max(node.end - node.start for node in nodes) for nodes in levels))
    for depth, nodes in enumerate(levels):
        if depth:
            session.select([node.parent for node in nodes])
        targets = level_targets(requests, nodes)
        texts = [as_tensor(requests[node.last - 1].read[node.start : node.end]) for node in nodes]
        logits = session.score(texts, torch.from_numpy(targets.wanted))
        if len(targets.ids):
            at, ids = (torch.from_numpy(array).to(logits.device) for array in (targets.rows, targets.ids))
            likely = logits.log_softmax(-1, torch.float32)[at, ids]
            first = logits.argmax(-1)[at] == ids
            owners = torch.from_numpy(targets.owners)
            totals.index_add_(0, owners, likely.double().cpu())
            greedy[owners[~first.cpu()]] = False
    session.free()
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))
