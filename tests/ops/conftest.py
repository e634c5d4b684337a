"""Every test of an op runs with poisoned memory: an output, or room to work in, that a kernel left out then shows."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    pass
