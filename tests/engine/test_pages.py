"""Pages and slots: nothing is given out twice, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.engine.pages import Pages, Slots


def test_all_or_none() -> None:
    pages = Pages(5)
    assert pages.num_free == 4
    assert pages.allocate(5) is None
    assert pages.num_free == 4
    assert pages.allocate(0) == []
    assert sorted(pages.allocate(4) or []) == [1, 2, 3, 4]  # 0 is nobody's
    assert pages.allocate(1) is None
    assert pages.num_used == 4


def test_shared_pages_stay_until_the_last_owner_lets_go() -> None:
    pages = Pages(4)
    held = pages.allocate(2)
    assert held is not None
    pages.share(held)
    pages.release(held)
    assert pages.num_free == 1
    assert [pages.references(page) for page in held] == [1, 1]
    pages.release(held)
    assert pages.num_free == 3
    with pytest.raises(AssertionError, match="belongs to nobody"):
        pages.release(held)
    with pytest.raises(AssertionError, match="belongs to nobody"):
        pages.share(held)


def test_slots() -> None:
    slots = Slots(3)
    first, second = slots.allocate(), slots.allocate()
    assert {first, second} == {1, 2}
    assert slots.allocate() is None
    assert first is not None
    slots.release(first)
    assert slots.num_free == slots.num_used == 1
    with pytest.raises(AssertionError, match="belongs to nobody"):
        slots.release(first)
    assert slots.allocate() == first
    slots.check()


@settings(max_examples=25, deadline=None)
@given(num_pages=st.integers(1, 12), data=st.data())
def test_any_order_of_calls(num_pages, data) -> None:
    """Owners come, share and go; at each moment a page is free or held by just those that hold it."""
    pages, owners = Pages(num_pages), []
    for _ in range(data.draw(st.integers(0, 30))):
        what = data.draw(st.sampled_from(["allocate", "share", "release"]))
        if what == "allocate":
            count, free = data.draw(st.integers(0, num_pages + 1)), pages.num_free
            taken = pages.allocate(count)
            assert (taken is None) == (count > free)
            if taken is not None:
                assert len(set(taken)) == count
                assert 0 not in taken
                assert not {page for owner in owners for page in owner} & set(taken)
                owners.append(taken)
        elif owners and what == "share":
            owners.append(list(data.draw(st.sampled_from(owners))))
            pages.share(owners[-1])
        elif owners:
            pages.release(owners.pop(data.draw(st.integers(0, len(owners) - 1))))
        pages.check()
        assert pages.num_used == len({page for owner in owners for page in owner})
    for owner in owners:
        pages.release(owner)
    assert pages.num_used == 0
