"""How requests get slots and pages, and what of them they share with snapshots and with each other."""

from __future__ import annotations

from array import array

import pytest

from oncelm.engine.memory import Memory
from oncelm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from oncelm.engine.pages import Pages, Slots
from oncelm.engine.params import SamplingParams
from oncelm.engine.pool import Pool
from oncelm.engine.prefix import PrefixCache
from oncelm.engine.request import Request
from oncelm.engine.text import TextState
from tests.models.small import make_model

PAGE = 4


def make_memory(num_pages: int = 9, num_slots: int = 4, caching: bool = True) -> Memory:
    pages, slots = Pages(num_pages), Slots(num_slots)
    cache = PrefixCache(Pool(make_model("retention"), num_pages, PAGE, num_slots), pages, slots, "a model")
    return Memory(pages, slots, PAGE, cache if caching else None)


def make_request(tokens: list[int], salt: str | None = None, **params: int) -> Request:
    answer, asked = CompletionOutput(0), SamplingParams(**params)
    known = [None] if asked.prompt_logprobs is not None else None
    output = RequestOutput("0", None, tokens, [answer], False, RequestMetrics(0.0), known)
    text = TextState(None, asked, tokens)
    return Request(output, answer, asked, array("i", tokens), len(tokens), 16, 0, text, salt=salt)


def test_all_or_nothing() -> None:
    memory = make_memory(caching=False)
    first, second = make_request([5] * 17), make_request([5] * 13)
    assert memory.place(first)
    assert (len(first.pages), first.n) == (5, 0)
    assert not memory.place(second)
    assert (second.slot, second.pages) == (0, [])
    assert not memory.place(make_request([5] * 9), spare_pages=1)
    assert memory.pages.num_free == 3
    assert memory.reserve(first, 20)
    assert memory.pages.num_free == 3  # there was room in the last page
    assert memory.reserve(first, 32)
    assert not memory.reserve(first, 33)
    memory.drop(first)
    memory.drop(first)
    assert memory.num_dropped == 1
    assert memory.pages.num_used == memory.slots.num_used == 0


def test_a_copy_shares_full_pages() -> None:
    memory = make_memory()
    request, fork = make_request([5] * 11), make_request([5] * 11)
    assert memory.place(request)
    request.n = 10
    assert memory.fork(request, fork)
    assert request.pages[:2] == fork.pages[:2]
    assert request.pages[2] != fork.pages[2]
    assert request.slot != fork.slot
    assert fork.n == 10
    memory.drop(request)
    assert memory.pages.num_used == 3
    memory.drop(fork)
    assert memory.pages.num_used == memory.slots.num_used == 0


@pytest.mark.parametrize("n", [6, 8, 10])
def test_a_request_goes_on_from_a_snapshot(n) -> None:
    memory = make_memory()
    first, second = make_request([5] * 11), make_request([5] * 12)
    assert memory.place(first)
    memory.snapshot(first, n)
    assert memory.place(second)
    assert second.n == n
    assert second.pages[: n // PAGE] == first.pages[: n // PAGE]
    assert not set(second.pages[n // PAGE :]) & set(first.pages)  # it writes behind n
    others = [make_request([5] * 12, salt="another"), make_request([5] * 12, prompt_logprobs=1), make_request([6] * 12)]
    memory.drop(second)
    for other in others:
        assert memory.place(other)
        assert other.n == 0
        memory.drop(other)
    memory.drop(first)
    assert memory.cache is not None
    memory.cache.close()
    assert memory.pages.num_used == memory.slots.num_used == 0


def test_snapshots_give_way_to_requests() -> None:
    memory = make_memory()
    first = make_request([5] * 11)
    assert memory.place(first)
    memory.snapshot(first, 10)
    memory.drop(first)
    assert memory.pages.num_used == 3
    large = make_request([6] * 32)
    assert memory.place(large)
    assert memory.pages.num_free == 0
    memory.drop(large)
    assert memory.pages.num_used == 0


def test_one_that_needs_all_memory_reads_again_what_its_own_snapshot_would_cost() -> None:
    """The snapshot's last page has to be copied, and there is none for the copy."""
    memory = make_memory()
    first = make_request([5] * 32)
    assert memory.place(first)
    memory.snapshot(first, 30)
    memory.drop(first)
    assert memory.place(again := make_request([5] * 32))
    assert (again.n, len(again.pages)) == (0, 8)


def test_what_has_proved_wrong_is_forgotten() -> None:
    memory = make_memory()
    first, second = make_request([5] * 11), make_request([5] * 12)
    assert memory.place(first)
    memory.snapshot(first, 10)
    memory.forget(first)
    assert memory.place(second)
    assert second.n == 0
