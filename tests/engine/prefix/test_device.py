"""Snapshots on the device: found wherever they stand, shared page by page, and gone when there is need."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.engine.prefix import tree
from tests.engine.prefix.stand_in import DTYPES, SMALL_BLOCK, Device, same, text


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hit_at_every_offset_around_borders_of_pages_and_blocks(dtype) -> None:
    for n in range(1, 3 * SMALL_BLOCK + 2):
        device = Device(dtype=dtype)
        made = device.remember(text(n))
        found, content = device.recall([*text(n), 5, 6])
        assert found == n
        assert same(content, made)
        assert device.recall(text(n)) == (0, {})  # a token must be left to read
        assert device.cache.match([*text(n - 1), 2000, 1]).n == 0
        device.check()


def test_the_longest_wins() -> None:
    device = Device()
    for n in (3, 8, 9, 17, 23):
        device.remember(text(n))
    for length in range(1, 40):
        expected = max((n for n in (3, 8, 9, 17, 23) if n < length), default=0)
        match = device.cache.match(text(length))
        assert match.n == expected
        assert match.shared >= match.n
    device.check()


def test_shared_says_how_far_a_text_is_known_where_no_snapshot_is() -> None:
    device = Device()
    device.remember(text(29))
    for length in range(1, 40):
        for common in range(length + 1):
            tokens = [*text(common), *[2000 + i for i in range(length - common)]]
            shared = device.cache.match(tokens).shared
            known = min(common, 29)
            assert shared == (29 if known == 29 else known // SMALL_BLOCK * SMALL_BLOCK)


def test_salts_and_models_are_apart() -> None:
    device = Device()
    device.remember(text(9), salt="a")
    assert device.cache.match(text(20), "a").n == 9
    assert device.cache.match(text(20), "b").n == device.cache.match(text(20)).n == 0
    others = [Device(fingerprint="other"), Device(dtype=DTYPES[1]), Device(page_size=8)]
    names = [one.cache.fingerprint for one in (device, *others)]
    assert len(set(names[:3])) == 3
    assert names[0] == names[3]  # a page's size is no part of what was computed


def test_a_kept_chain_gives_the_same_and_is_not_computed_again() -> None:
    device = Device()
    tokens = text(30)
    device.remember(tokens)
    chain = device.cache.chain()
    assert device.cache.match(tokens[:9], chain=chain).n == 0
    known = list(chain.digests)
    assert device.cache.match([*tokens, 1], chain=chain).n == 30
    assert chain.digests[: len(known)] == known
    assert len(chain.digests) == 30 // SMALL_BLOCK + 1


def test_a_lookup_ends_where_no_known_text_goes_on() -> None:
    device = Device()
    device.remember(text(20))
    chain = device.cache.chain()
    device.cache.match([*text(8), *range(3000, 13_000)], chain=chain)
    assert len(chain.digests) <= 3


def test_full_pages_are_shared_and_the_last_one_is_copied() -> None:
    device = Device(page_size=4)
    made = device.remember(text(10))
    first, second = device.request([*text(10), 1, 2, 3]), device.request([*text(10), 4, 5, 6])
    for request in (first, second):
        assert device.cache.match(request.tokens).held_pages == 2
        assert request.resume() == 10
        request.read(13)
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2]
    assert same(device.recall([*text(10), 9])[1], made)  # neither has written on it
    for request in (first, second):
        assert same(request.content(), alone(request.tokens))
        request.end()
    device.check()


def alone(tokens: list[int]):
    return Device().remember(tokens)


def test_the_request_that_made_a_snapshot_goes_on_behind_it() -> None:
    device = Device()
    request = device.request(text(30))
    made = []
    for n in (5, 6, 11, 30):
        request.read(n)
        made.append((n, request.content()))
        assert request.add().n == n
    request.end()
    for n, content in made:
        found, restored = device.recall([*text(n), 7777])
        assert found == n
        assert same(restored, content)
    device.check()


def test_what_was_not_used_for_longest_goes_first() -> None:
    device = Device(num_pages=8 + 1, page_size=4, num_slots=20)
    for seed in range(4):
        device.remember(text(8, seed))
    device.recall(text(9, 0))  # used
    device.remember(text(8, 4))
    assert [device.cache.match(text(9, seed)).n for seed in range(5)] == [8, 0, 8, 8, 8]
    assert device.cache.counts.evicted_device == 1
    device.check()


def test_a_slot_is_taken_from_another_snapshot() -> None:
    device = Device(num_slots=4)  # of which one is scratch and one the request's
    for seed in range(3):
        device.remember(text(5, seed))
    assert [device.cache.match(text(9, seed)).n for seed in range(3)] == [0, 5, 5]
    device.check()


def test_nothing_goes_in_vain() -> None:
    device = Device(num_pages=10 + 1, page_size=4)
    device.remember(text(12))
    running = device.request(text(16, 1))
    running.read(16)
    running.add()
    assert not device.cache.free(num_pages=7)  # four of the ten are the running request's
    assert not device.cache.free(num_slots=15)
    assert len(device.cache.tree) == 2
    assert device.cache.free(num_pages=6)
    running.end()
    device.check()


def test_snapshots_whose_pages_others_have_stay_when_pages_are_needed() -> None:
    device = Device(num_pages=20 + 1, page_size=4)
    running = device.request(text(40))
    for n in (8, 16, 40):
        running.read(n)
        running.add()
    device.remember(text(32, 1))
    assert device.cache.free(num_pages=10)
    assert [device.cache.match(text(n + 1)).n for n in (8, 16, 40)] == [8, 16, 40]
    assert device.cache.match(text(33, 1)).n == 0
    running.end()
    assert device.cache.free(num_pages=15)  # 24 tokens of the longest
    assert [device.cache.match(text(n + 1)).n for n in (8, 16, 40)] == [8, 16, 16]
    device.check()


def test_what_is_to_be_restored_stays() -> None:
    device = Device(num_pages=10 + 1, page_size=4)
    device.remember(text(12))
    device.remember(text(12, 1))
    match = device.cache.match(text(20))
    assert device.cache.free(num_pages=7, keep=match)
    assert not device.cache.free(num_pages=8, keep=match)
    assert device.recall(text(20))[0] == 12


def test_a_snapshot_that_went_meanwhile_is_not_restored() -> None:
    device = Device()
    device.remember(text(9))
    match = device.cache.match(text(20))
    device.cache.free(num_pages=device.pages.num_pages - 1)
    request = device.request(text(20))
    assert device.cache.restore(match, request.slot, device.allocate) is None
    request.end()
    device.check()


def test_no_pages_left_means_no_restore_and_no_leak() -> None:
    device = Device(num_pages=3 + 1, page_size=4)
    device.remember(text(10))
    request = device.request(text(12))
    match = device.cache.match(request.tokens)
    assert device.cache.restore(match, request.slot, lambda count: None) is None
    request.end()
    device.check()


def test_pages_that_are_asked_for_may_be_those_of_the_snapshot() -> None:
    """A pool so small that the copy of the last page is had by evicting the very snapshot."""
    device = Device(num_pages=3 + 1, page_size=4)
    made = device.remember(text(10))
    found, content = device.recall(text(12))
    assert found in (0, 10)
    assert not found or same(content, made)
    device.check()


def test_all_is_given_back_at_the_end() -> None:
    device = Device()
    for seed in range(3):
        device.remember(text(11, seed))
    device.cache.close()
    assert device.pages.num_used == device.slots.num_used == 0
    assert device.cache.nbytes()["device"] == 0


@settings(max_examples=25, deadline=None)
@given(data=st.data(), page_size=st.sampled_from([1, 3, 4, 8]), num_slots=st.integers(3, 9))
def test_any_use_gives_what_a_dictionary_would(data, page_size, num_slots) -> None:
    """Random texts over few words, so that many begin alike; what is restored is what was kept, and nothing leaks."""
    device = Device(num_pages=40 // page_size + 9, page_size=page_size, num_slots=num_slots)
    kept: dict[tuple[str | None, tuple[int, ...]], dict] = {}
    for step in range(data.draw(st.integers(1, 25))):
        words = data.draw(st.lists(st.sampled_from([(1,), (2, 3), tuple(range(4, 11))]), min_size=1, max_size=5))
        tokens, salt = [token for word in words for token in word], data.draw(st.sampled_from([None, "salt"]))
        match = device.cache.match(tokens, salt)
        longest = max((n for n in range(1, len(tokens)) if (salt, tuple(tokens[:n])) in kept), default=0)
        assert match.n == longest if not device.cache.counts.evicted_device else match.n <= longest
        request = device.request(tokens, flavour=step, salt=salt)
        n = request.resume()
        if n:
            assert same(request.content(), kept[salt, tuple(tokens[:n])])
        for stop in sorted(data.draw(st.sets(st.integers(n + 1, len(tokens)), max_size=2))):
            request.read(stop)
            if request.add() is not None and request.after.n == stop:
                kept[salt, tuple(tokens[:stop])] = request.content()
        request.end()
        if data.draw(st.booleans()):
            device.cache.free(data.draw(st.integers(0, 12)), data.draw(st.integers(0, num_slots - 1)))
        device.check()
    device.cache.free(device.pages.num_pages - 1, num_slots - 1)
    assert not len(device.cache.tree)
    assert not device.cache.tree.num_blocks
    assert device.pages.num_used == device.slots.num_used == 0


def test_an_empty_tree_forgets_all_text() -> None:
    known = tree.Tree()
    assert len(known) == known.num_blocks == 0
