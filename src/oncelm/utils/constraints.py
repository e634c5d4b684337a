"""What a setting may be, declared beside its field: `steps: Annotated[int, Whole(1)] = 1000`.

`constraints_of(cls)` reads the annotations of a class and fails where a field has none, so that none is forgotten;
`check_all` applies them in one loop. Whatever else a value is, nan, text, true, a list, too large, is a ValueError that
names the field and what is allowed.
"""

from __future__ import annotations

import inspect
import math
import os
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Annotated, Any

from oncelm.utils.errors import shown, unknown

LARGEST = 2**63 - 1  # what tensors and files can hold


class Constraint(ABC):
    """What values are allowed.

    Attributes:
        optional: None is allowed, and stays None.
    """

    optional: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        """The value, in the field's type; ValueError naming `name` for one that is not allowed."""
        if self.optional and value is None:
            return None
        return self.check(name, value)

    @abstractmethod
    def check(self, name: str, value: Any) -> Any: ...

    def refuse(self, name: str, value: Any) -> ValueError:
        return ValueError(f"{name} must be {self.describe()}, got {shown(value)}.")

    def describe(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Whole(Constraint):
    """A whole number from `low` to `high`; neither True nor 8.0 is one."""

    low: int = 0
    high: int = LARGEST
    optional: bool = False

    def check(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < self.low:
            raise self.refuse(name, value)
        if int(value) > self.high:
            raise ValueError(f"{name} must be at most {self.high}, got {shown(value)}.")
        return int(value)

    def describe(self) -> str:
        return f"a whole number of at least {self.low}"


@dataclass(frozen=True)
class Number(Constraint):
    """A finite number, from `low` to `high`, or between them where they are `open_low` or `open_high`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self.refuse(name, value)
        try:
            number = float(value)
        except OverflowError:  # of a whole number
            raise self.refuse(name, value) from None
        fits = self.low <= number <= self.high and math.isfinite(number)
        if not fits or (self.open_low and number == self.low) or (self.open_high and number == self.high):
            raise self.refuse(name, value)
        return value if isinstance(value, int | float) and abs(value) <= LARGEST else number

    def describe(self) -> str:
        low = "" if self.low == -math.inf else f"above {self.low:g}" if self.open_low else f"of at least {self.low:g}"
        high = "" if self.high == math.inf else f"below {self.high:g}" if self.open_high else f"at most {self.high:g}"
        if low and high and not self.open_low and not self.open_high:
            return f"a number from {self.low:g} to {self.high:g}"
        return (
            f"a {'' if low or high else 'finite '}number {' and '.join(part for part in (low, high) if part)}".rstrip()
        )


POSITIVE = Number(0, open_low=True)


@dataclass(frozen=True)
class Flag(Constraint):
    """True or False, and not 0 or 1."""

    optional: bool = False

    def check(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(name, value)
        return value

    def describe(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text(Constraint):
    """Text, or a path; not the empty one, unless that is allowed."""

    empty: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str) or not (value or self.empty) or "\0" in value:
            raise self.refuse(name, value)
        return value

    def describe(self) -> str:
        return "text"


@dataclass(frozen=True)
class OneOf(Constraint):
    """One of several values, such as names."""

    choices: tuple[Any, ...]
    optional: bool = False

    def check(self, name: str, value: Any) -> Any:
        for choice in self.choices:
            if type(choice) is type(value) and choice == value:
                return choice
        raise unknown(name, value, self.choices)


@dataclass(frozen=True)
class Only(Constraint):
    """A key of other models that can only have the value that says: not used."""

    value: Any
    why: str
    optional: bool = True

    def check(self, name: str, value: Any) -> Any:
        if value != self.value or isinstance(value, bool) != isinstance(self.value, bool):
            raise ValueError(f"{name} is not offered, got {shown(value)}: {self.why}. Leave it at {self.value!r}.")
        return value


@dataclass(frozen=True)
class Each(Constraint):
    """A list, or tuple, of values that all fit `item`; of exactly `count` ones if that is given. It becomes `kind`.

    With `or_one`, a value by itself is allowed too.
    """

    item: Constraint
    count: int | None = None
    kind: type = list
    or_one: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> Any:
        if self.or_one and not isinstance(value, list | tuple):
            try:
                return self.item(name, value)
            except ValueError:
                raise self.refuse(name, value) from None
        if not isinstance(value, list | tuple) or (self.count is not None and len(value) != self.count):
            raise self.refuse(name, value)
        return self.kind(self.item(f"{name}[{i}]", item) for i, item in enumerate(value))

    def describe(self) -> str:
        items = "names" if isinstance(self.item, OneOf) else f"{self.item.describe()} each"
        alone = f"{self.item.describe()}, or " if self.or_one else ""
        return f"{alone}a list{'' if self.count is None else f' of {self.count}'}, {items}"


@dataclass(frozen=True)
class Keyed(Constraint):
    """A dictionary with text keys, whose values fit the constraints in `inner`; others are checked where they are used.

    With `any_keys`, keys are of any type.
    """

    inner: Mapping[str, Constraint] = field(default_factory=dict)
    any_keys: bool = False
    optional: bool = False

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, Mapping) or not (self.any_keys or all(isinstance(key, str) for key in value)):
            raise self.refuse(name, value)
        for key in self.inner.keys() & value.keys():
            self.inner[key](f"{name}.{key}", value[key])
        return value

    def describe(self) -> str:
        return "a dictionary" + ("" if self.any_keys else " with text keys")


Count = Annotated[int, Whole(1)]
Positive = Annotated[float, POSITIVE]
Fraction = Annotated[float, Number(0, 1)]
Name = Annotated[str, Text()]


def constraints_of(cls: type) -> dict[str, Constraint]:
    """The constraint of every field that `cls` itself declares, by name."""
    hints = inspect.get_annotations(cls, eval_str=True)
    return {
        name: constraint_of(f"{cls.__name__}.{name}", hint)
        for name, hint in hints.items()
        if typing.get_origin(hint) is not typing.ClassVar
    }


def constraint_of(where: str, hint: Any) -> Constraint:
    """The constraint in a type hint; that of `bool` is understood. TypeError for a hint that declares none."""
    optional = types.NoneType in typing.get_args(hint)  # Count | None
    inner = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if optional and len(inner) == 1:
        hint = inner[0]
    if typing.get_origin(hint) is Annotated:
        base, *notes = typing.get_args(hint)
        optional |= types.NoneType in typing.get_args(base)  # Annotated[int | None, Whole(1)]
        found = [note for note in notes if isinstance(note, Constraint)]
        if len(found) == 1:
            return replace(found[0], optional=True) if optional else found[0]  # type: ignore[type-var]
    if hint is bool:
        return Flag(optional)
    raise TypeError(f"{where}: {hint} does not say what is allowed; write Annotated[{hint}, Whole(1)] or the like.")


def check_all(values: Mapping[str, Any], constraints: Mapping[str, Constraint]) -> dict[str, Any]:
    """Those of the values that have a constraint, each as it returns them; ValueError for the first that is wrong."""
    return {name: constraint(name, values[name]) for name, constraint in constraints.items() if name in values}


def check_options(options: object, constraints: Mapping[str, Constraint]) -> None:
    """ValueError naming the first option of a command line that is given and not allowed, as it is written there."""
    for name, constraint in constraints.items():
        if getattr(options, name) is not None:
            constraint(f"--{name.replace('_', '-')}", getattr(options, name))
