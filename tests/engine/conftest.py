"""Fixtures of the engine's tests."""

from tests.models.conftest import models

__all__ = ["models"]
