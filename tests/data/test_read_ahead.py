"""Read ahead: the same batches, already there when asked for; errors arrive where they belong."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from oncelm.data.batch import TrainBatch
from oncelm.data.conversations import Conversation, ConversationDataset
from oncelm.data.dataset import TokenDataset
from oncelm.data.read_ahead import ReadAhead


@pytest.fixture
def dataset() -> TokenDataset:
    return TokenDataset(np.arange(5000, dtype=np.uint32), 8, seed=3)


class Slow:
    """A dataset that takes its time, and remembers what it was asked for."""

    def __init__(self, dataset: TokenDataset, seconds: float = 0.0, fails_at: int = -1) -> None:
        self.dataset, self.seconds, self.fails_at = dataset, seconds, fails_at
        self.steps: list[int] = []

    def batch(self, step: int, count: int, rows: slice | None = None) -> TrainBatch:
        self.steps.append(step)
        time.sleep(self.seconds)
        if step == self.fails_at:
            raise OSError("the disk is gone")
        return self.dataset.batch(step, count, rows)


def test_batches_are_those_of_the_dataset_whatever_is_asked(dataset: TokenDataset) -> None:
    with ReadAhead(dataset) as ahead:
        for step in (0, 1, 2, 3, 9, 10, 4, 4, 5, 500, 0):
            for rows in (None, slice(0, 2), slice(2, 4), slice(1, None, 2)):
                assert torch.equal(ahead.batch(step, 4, rows).tokens, dataset.batch(step, 4, rows).tokens)
            assert ahead.num_targets(step, 4) == 4 * 7


def test_the_next_batches_are_read_meanwhile_and_each_once(dataset: TokenDataset) -> None:
    slow = Slow(dataset)
    with ReadAhead(slow, depth=2) as ahead:
        for step in range(10):
            ahead.batch(step, 4)
            deadline = time.monotonic() + 30
            while slow.steps[-1] < step + 2 and time.monotonic() < deadline:
                time.sleep(0.001)  # the computation of a step
            assert slow.steps == list(range(step + 3))


def test_an_error_is_raised_by_the_call_it_belongs_to(dataset: TokenDataset) -> None:
    with ReadAhead(Slow(dataset, fails_at=2)) as ahead:
        ahead.batch(0, 4)
        ahead.batch(1, 4)
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.batch(2, 4)
        assert torch.equal(ahead.batch(3, 4).tokens, dataset.batch(3, 4).tokens)


def test_closing_ends_the_thread_and_forgets_the_rest(dataset: TokenDataset) -> None:
    slow = Slow(dataset, 0.05)
    ahead = ReadAhead(slow, depth=50)
    ahead.batch(0, 4)
    ahead.close()
    ahead.close()
    read = len(slow.steps)
    assert read < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_all_of_a_batch_is_read_ahead() -> None:
    tokens, answer = np.arange(4, 9, dtype=np.uint32), np.array([False, False, True, True, False])
    chats = ConversationDataset([Conversation(tokens + i, answer, f"a:{i}") for i in range(40)], 8)
    with ReadAhead(chats) as ahead:
        for step in range(3):
            assert ahead.num_targets(step, 4) == chats.batch(step, 4).num_targets == 8
            found, whole = ahead.batch(step, 4, slice(1, 3)), chats.batch(step, 4)
            assert torch.equal(found.labels, whole.labels[1:3])
            assert found.lengths == (5, 3, 5, 3)
        assert sorted(key[1] for key in ahead._ahead) == [3, 3, 4, 4]


@pytest.mark.gpu
def test_batches_are_pinned_for_a_gpu(dataset: TokenDataset) -> None:
    with ReadAhead(dataset, pin_memory=True) as ahead:
        assert ahead.batch(0, 4).tokens.is_pinned()
