"""Constraints: what each allows, what it says of the rest, and that no field can be without one."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncelm.utils.constraints import (
    LARGEST,
    POSITIVE,
    Each,
    Flag,
    Keyed,
    Number,
    OneOf,
    Only,
    Text,
    Whole,
    check_all,
    constraints_of,
)

DEEP: list[Any] = []
DEEP.append(DEEP)  # holds itself, as YAML can say it
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.lists(st.integers(), max_size=3)
)


@pytest.mark.parametrize(
    ("constraint", "allowed", "refused", "message"),
    [
        (Whole(1), [1, 2**40, np.int64(3)], [0, 1.0, True, "1", None, [1]], "must be a whole number of at least 1"),
        (Whole(0, 9), [0, 9], [10, 10**5000], "must be at most 9"),
        (Number(0, 1), [0, 1, 0.5, np.float32(0.5)], [-0.1, 1.1, math.nan], "must be a number from 0 to 1"),
        (Number(0, 1, open_high=True), [0, 0.99], [1], "must be a number of at least 0 and below 1"),
        (POSITIVE, [1e-300, 3, 2**70], [0, math.inf, math.nan, True, "1", 10**400], "must be a number above 0"),
        (Number(), [-1e300], [math.nan, -math.inf, None], "must be a finite number"),
        (Flag(), [True, False], [0, 1, "true", None], "must be true or false"),
        (Text(), ["a"], ["", "a\0b", 5, None], "must be text"),
        (OneOf(("a", "b")), ["a"], ["A", 1, ["a"], None], "unknown x"),
        (OneOf((1,)), [1], [True, 1.0], "unknown x"),
        (Only(False, "there is none"), [False], [True, 0, "no"], "is not offered.*there is none"),
        (Each(Whole(1), count=2), [[1, 2], (1, 2)], [[1], 1, "12", {1: 2}], "must be a list of 2"),
        (Each(Whole(1)), [[], [1]], [[1, 0]], r"x\[1\] must be a whole number of at least 1, got 0"),
        (Each(Whole(0), or_one=True), [3, [3]], ["3", 1.5], "at least 0, or a list, a whole number"),
        (Keyed({"a": Flag()}), [{}, {"a": True, "b": 1}], [{"a": 1}], "x.a must be true or false, got 1"),
        (Keyed(), [{"a": 1}], [{1: 1}, [], None], "must be a dictionary with text keys"),
    ],
)
def test_what_is_allowed(constraint, allowed, refused, message) -> None:
    for value in allowed:
        found = constraint("x", value)
        assert list(found) == list(value) if isinstance(value, tuple) else found == value
    for value in refused:
        with pytest.raises(ValueError, match=message) as error:
            constraint("x", value)
        assert len(str(error.value)) < 300
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [DEEP, [[["x" * 10**6] * 9] * 9], 10**5000, {"a": DEEP}, "x\n" * 10**6], ids=type)
def test_an_error_shows_little_of_what_is_large(value) -> None:
    for constraint in (Flag(), Whole(0, 1), OneOf(("a",)), Number(0, 1)):
        with pytest.raises(ValueError, match="x") as error:
            constraint("x", value)
        assert len(str(error.value)) < 500
        assert "\n" not in str(error.value)


@given(value=ANYTHING, low=st.integers(-3, 3), high=st.integers(4, 9))
def test_whole_is_a_range(value, low, high) -> None:
    inside = type(value) is int and low <= value <= high
    try:
        assert Whole(low, high)("x", value) == value
    except ValueError:
        assert not inside
    else:
        assert inside


@given(value=ANYTHING)
def test_none_is_for_what_is_optional(value) -> None:
    for kind in (Whole, Number, Flag, Text):
        assert kind(optional=True)("x", None) is None
        with pytest.raises(ValueError, match="x must be"):
            kind()("x", None)


def test_constraints_are_read_from_annotations() -> None:
    class Settings:
        steps: Annotated[int | None, Whole(1)]
        quick: bool

    assert constraints_of(Settings) == {"steps": Whole(1, optional=True), "quick": Flag()}
    assert check_all({"steps": None, "quick": True, "other": 1}, constraints_of(Settings)) == {
        "steps": None,
        "quick": True,
    }
    assert Whole().high == LARGEST


@pytest.mark.parametrize("hint", ["int", "float", "str | None", "Annotated[int, 'of tokens']", "list[int]"])
def test_a_field_without_a_constraint_is_an_error(hint) -> None:
    bare = type("Bare", (), {"__annotations__": {"steps": hint}, "__module__": __name__})
    with pytest.raises(TypeError, match=r"Bare\.steps: .* does not say what is allowed"):
        constraints_of(bare)
