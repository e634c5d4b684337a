"""Nothing is asked of a network: what looks like a hub id is refused at once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="package", autouse=True)
def _no_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
