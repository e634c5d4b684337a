"""Snapshots of what was read, for requests that begin alike: on the device, in CPU memory, on disk."""

from oncelm.engine.prefix.cache import Match, PrefixCache

__all__ = ["Match", "PrefixCache"]
