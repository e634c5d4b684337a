"""Requests that begin alike as a tree: what they have in common is a node, a level of nodes is one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from oncelm.eval.codec import common_prefix
from oncelm.eval.prefix import WORTH_SHARING
from oncelm.models.session import READ_AT_ONCE


@dataclass(frozen=True)
class Request:
    """Score `continuation` behind `context`, token ids int32 [T], at least one each."""

    context: np.ndarray
    continuation: np.ndarray

    @cached_property
    def read(self) -> np.ndarray:
        """What the model must read to score it: all but the last token."""
        return np.concatenate((self.context, self.continuation[:-1]))

    @cached_property
    def place(self) -> bytes:
        """Bytes that sort as the tokens read do."""
        return self.read.astype(">u4").tobytes()


@dataclass(frozen=True)
class Node:
    """Tokens start to end of requests first to last (exclusive) of a batch, read once for all of them.

    They are the last request's; the others have the same, or end before.
    """

    first: int
    last: int
    start: int
    end: int
    parent: int  # index in the level above


def tree_levels(requests: Sequence[Request], targets_at_once: int) -> list[list[Node]]:
    """The tree of requests sorted by `place`, level by level."""
    read = [request.read for request in requests]
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

    parts = [(0, 0, 0, len(requests), 0)]  # depth, parent, first, last, start: not laid out yet
    while parts:  # `start` tokens of requests first to last are read, and at least as many are common
        depth, parent, first, last, start = parts.pop()
        common = len(read[first]) if last - first == 1 else common_prefix(read[first], read[last - 1])
        if last - first == 1 or common - start >= WORTH_SHARING:
            if common > start:
                depth, parent = add(depth, parent, first, last, start, common)
            start = common
        while first < last:
            after = first + 1
            if len(read[first]) > common:
                while after < last and read[after][common] == read[first][common]:
                    after += 1
                parts.append((depth, parent, first, after, start))
            elif common > start:  # it ends here
                add(depth, parent, first, after, start, common)
            first = after
    return levels


def single_level(requests: Sequence[Request]) -> list[list[Node]]:
    """Requests sorted by `place` without branches: whole texts, of which one may hold others as its beginnings."""
    nodes: list[Node] = []
    last = len(requests)
    while last:
        longest, first = requests[last - 1].read, last - 1
        while first and common_prefix(requests[first - 1].read, longest) == len(requests[first - 1].read):
            first -= 1
        nodes.append(Node(first, last, 0, len(longest), 0))
        last = first
    return [nodes[::-1]]


@dataclass(frozen=True)
class Targets:
    """What a level of nodes predicts.

    Attributes:
        wanted: which of the level's tokens, one node behind the other, predict a target, bool [T].
        owners: of each target its request, int64 [K]; one token may predict targets of several requests.
        rows: of each target the one of the wanted tokens that predicts it, int64 [K].
        ids: the targets, int64 [K].
    """

    wanted: np.ndarray
    owners: np.ndarray
    rows: np.ndarray
    ids: np.ndarray


def level_targets(requests: Sequence[Request], nodes: Sequence[Node]) -> Targets:
    """The targets of a level."""
    wanted = np.zeros(sum(node.end - node.start for node in nodes), bool)
    owners, places, ids, offset = [], [], [], 0  # places: in the level's tokens
    for node in nodes:
        for i in range(node.first, node.last):
            before = len(requests[i].context) - 1  # the position that predicts the continuation's first token
            start, stop = max(before, node.start), min(before + len(requests[i].continuation), node.end)
            if start < stop:
                owners.append(np.full(stop - start, i))
                places.append(np.arange(start, stop) + (offset - node.start))
                ids.append(requests[i].continuation[start - before : stop - before])
        offset += node.end - node.start
    none = np.empty(0, np.int64)
    place = np.concatenate((none, *places))
    wanted[place] = True
    rows = np.cumsum(wanted)[place] - 1
    return Targets(wanted, np.concatenate((none, *owners)), rows, np.concatenate((none, *ids)))
