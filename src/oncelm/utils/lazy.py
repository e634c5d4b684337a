"""Names of a package that are imported when they are first asked for, or that have changed (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def renamed(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` that answers each old name by an error with the new one."""

    def find(name: str) -> Any:
        if name in names:  # an AttributeError would lose its text in `from package import name`
            raise ImportError(f"{package}.{name} is {package}.{names[name]} now.")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def lazy_names(package: str, homes: Mapping[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], Callable[[], Any]]:
    """A package's `__getattr__` and `__dir__`; type checkers need the same imports under TYPE_CHECKING.

    Args:
        package: its `__name__`.
        homes: the names that each module gives; "" for the submodules themselves.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = home_of[name]
        return getattr(importlib.import_module(home), name) if home else importlib.import_module(f"{package}.{name}")

    return find, lambda: sorted({*vars(sys.modules[package]), *home_of})
