from __future__ import annotations

import pytest

from oncelm.engine.prefix import cache, header, tree  # now: one that is imported while blocks are small keeps them
from tests.engine.prefix.stand_in import SMALL_BLOCK


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few tokens, so that small texts have several."""
    for module in (tree, cache, header):
        monkeypatch.setattr(module, "BLOCK", SMALL_BLOCK)
