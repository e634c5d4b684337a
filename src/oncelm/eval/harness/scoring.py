"""How likely a model finds given continuations of given contexts, many at a time.

Requests are sorted by their tokens and laid out as a tree: what several of them begin with (few-shot examples, a
question with its choices) is one node, read once. A batch of the tree is computed level by level as packed rows; going
down a level repeats the rows of the cache. YOCO's cross-decoder runs on the positions whose next token is scored, on no
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from oncelm.eval.examples import Score
from oncelm.eval.model import LOGITS_AT_ONCE, READ_AT_ONCE, LanguageModel, common_prefix
from oncelm.eval.prefix import PrefixReader
from oncelm.eval.runner import LOOK_AHEAD
from oncelm.models.yoco.modeling import YocoForCausalLM

WORTH_A_LEVEL = 16  # tokens: shorter common beginnings are read again
TOKENS_AT_ONCE = 1 << 14  # read in one forward pass, about
CACHE_AT_ONCE = 1 << 31  # bytes of the rows of a level's cache


@dataclass(frozen=True)
class Request:
    """Score `continuation` behind `context`, token ids int32 [T], at least one each."""

    context: np.ndarray
    continuation: np.ndarray

    @property
    def read(self) -> np.ndarray:
        """What the model must read to score it: all but the last token."""
        return np.concatenate((self.context, self.continuation[:-1]))


Answer = tuple[float, bool]  # summed natural log-likelihood; whether greedy decoding would write this continuation


@torch.no_grad()
def score_requests(
    model: LanguageModel, requests: Sequence[Request], progress: Callable[[int], object] = lambda count: None
) -> list[Answer]:
    """The answers, in the requests' order. `progress` is told how many more are done, now and then."""
    order = sorted(range(len(requests)), key=lambda i: requests[i].read.tolist())
    sort = [requests[i] for i in order]
    answers = _score_tree if isinstance(model.model, YocoForCausalLM) else _score_one_by_one
    found: list[Answer] = [(0.0, False)] * len(requests)
    for i, answer in zip(order, answers(model, sort, progress), strict=True):
        found[i] = answer
    return found


def _score_one_by_one(
    model: LanguageModel, requests: Sequence[Request], progress: Callable[[int], object]
) -> Iterator[Answer]:
    """Sorted requests through one reader, which rewinds to where they part: any causal LM."""
    prefix = PrefixReader(model)
    examples = [Score(request.context, request.continuation) for request in requests]
    for i, example in enumerate(examples):
        reader, _ = prefix.read(example, examples[i + 1 : i + 1 + LOOK_AHEAD])
        scores = reader.score(example.continuation)
        progress(1)
        yield float(scores.log_likelihoods.sum(dtype=np.float64)), bool(scores.greedy.all())


def _score_tree(
    model: LanguageModel, requests: Sequence[Request], progress: Callable[[int], object]
) -> Iterator[Answer]:
    """Sorted requests a batch at a time."""
    yoco = model.model
    longest = max(len(request.read) for request in requests)
    row_bytes = yoco.new_cache(1, max_tokens=longest).nbytes()
    limits = TOKENS_AT_ONCE, max(1, LOGITS_AT_ONCE // yoco.config.vocab_size), max(1, CACHE_AT_ONCE // row_bytes)
    start = 0
    for end in _batch_ends(requests, *limits):
        yield from _score_batch(yoco, requests[start:end], limits[1])
        progress(end - start)
        start = end


def _batch_ends(requests: Sequence[Request], tokens: int, targets: int, rows: int) -> Iterator[int]:
    """Where to cut sorted requests into batches of at most so many tokens to read, targets and rows.

    A cut is moved back, within the batch's second half, to where the fewest tokens are shared across it.
    """
    read = [request.read for request in requests]
    shared = [0, *(common_prefix(a, b) for a, b in pairwise(read))]
    start = 0
    while start < len(requests):
        costs = np.zeros(3, np.int64)
        end = start
        while end < len(requests):
            new = len(read[end]) - (shared[end] if end > start else 0)
            costs += (new, len(requests[end].continuation), 1)
            if end > start and (costs > (tokens, targets, rows)).any():
                break
            end += 1
        if end < len(requests):
            middle = (start + end) // 2 + 1
            end = min(range(end, middle - 1, -1), key=lambda i: shared[i]) if middle <= end else end
        yield end
        start = end


@dataclass(frozen=True)
class Node:
    """Tokens start to end of the requests first to last (exclusive) of a batch, which all have them in common."""

    first: int
    last: int
    start: int
    end: int
    parent: int  # index in the level above


def _score_batch(yoco: YocoForCausalLM, requests: Sequence[Request], targets_at_once: int) -> list[Answer]:
    read = [request.read for request in requests]
    levels = _levels(requests, read, targets_at_once)
    device = yoco.device
    totals = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.ones(len(requests), dtype=torch.bool)
    room = sum(max(node.end - node.start for node in nodes) for nodes in levels)  # of any row, and of the cache's check
    cache = yoco.new_cache(len(levels[0]), max_tokens=room)
    for depth, nodes in enumerate(levels):
        if depth:
            cache.select([node.parent for node in nodes])
        wanted, picked = _targets(requests, nodes)
        ids = np.concatenate([read[node.first][node.start : node.end] for node in nodes])
        borders = [0, *accumulate(node.end - node.start for node in nodes)]
        logits = yoco(
            torch.from_numpy(ids).to(device, torch.long)[None],
            past_key_values=cache,
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            logits_to_keep=torch.from_numpy(wanted)[None],
        ).logits  # [count, V]
        if picked:
            owners = torch.tensor([owner for owner, _, _ in picked])
            at, wanted_ids = torch.tensor([place for _, *place in picked], device=device).unbind(1)
            normal = logits.float().logsumexp(-1)  # [count]
            likely = logits[at, wanted_ids].float() - normal[at]
            totals.index_add_(0, owners, likely.double().cpu())
            greedy[owners[(logits.argmax(-1)[at] != wanted_ids).cpu()]] = False
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))


def _targets(requests: Sequence[Request], nodes: Sequence[Node]) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Which of a level's tokens predict a target, bool [T], and the targets: (request, row of the logits, token)."""
    masks, picked, count = [], [], 0
    for node in nodes:
        spans = []
        mask = np.zeros(node.end - node.start, bool)
        for i in range(node.first, node.last):
            before = len(requests[i].context) - 1  # the position that predicts the continuation's first token
            span = range(max(before, node.start), min(before + len(requests[i].continuation), node.end))
            mask[span.start - node.start : max(span.stop, span.start) - node.start] = True
            spans.append((i, before, span))
        rows = count + np.cumsum(mask) - 1
        for i, before, span in spans:
            for position in span:
                picked.append((i, int(rows[position - node.start]), int(requests[i].continuation[position - before])))
        masks.append(mask)
        count += int(mask.sum())
    return np.concatenate(masks), picked


def _levels(requests: Sequence[Request], read: list[np.ndarray], targets_at_once: int) -> list[list[Node]]:
    """The tree of sorted requests, level by level."""
    levels: list[list[Node]] = []

    def add(depth: int, parent: int, first: int, last: int, start: int, end: int) -> tuple[int, int]:
        """A node, or a chain of them where that is too much for one forward pass: depth and index of the last."""
        target = min(len(request.context) - 1 for request in requests[first:last])
        target = min(max(target, start), end)
        cuts = [*range(start, target, READ_AT_ONCE), *range(target, end, targets_at_once)]
        if target - start < READ_AT_ONCE and end - target <= targets_at_once:
            cuts = [start]
        for begin, finish in zip(cuts, [*cuts[1:], end], strict=True):
            if depth == len(levels):
                levels.append([])
            levels[depth].append(Node(first, last, begin, finish, parent))
            parent = len(levels[depth]) - 1
            depth += 1
        return depth, parent

    def split(depth: int, parent: int, first: int, last: int, start: int) -> None:
        """Lay out requests first to last, of which `start` tokens are read and at least as many are common."""
        common = len(read[first]) if last - first == 1 else common_prefix(read[first], read[last - 1])
        if last - first == 1 or common - start >= WORTH_A_LEVEL:
            if common > start:
                depth, parent = add(depth, parent, first, last, start, common)
            start = common
        while first < last:
            if len(read[first]) == common:  # it ends here
                if common > start:
                    add(depth, parent, first, first + 1, start, common)
                first += 1
                continue
            after = first + 1
            while after < last and len(read[after]) > common and read[after][common] == read[first][common]:
                after += 1
            split(depth, parent, first, after, start)
            first = after

    split(0, 0, 0, len(requests), 0)
    return levels
