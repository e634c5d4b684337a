"""N texts read by one model: read, step, score, mark, rewind, select.

    session = open_session(model, rows=1, room=1000)
    logits = session.read(prompt)  # [1, T] -> [1, V]
    place = session.mark()
    for _ in range(100):
        logits = session.step(logits.argmax(-1, keepdim=True))
    session.rewind(place)

Evaluation, benchmarks and the command line drive models through it. There are two kinds: `CacheSession` for OnceLM's
families, through their own caches, and `TransformersSession` for any other causal language model. Anything else that
runs a model, such as an engine, should have the same methods.

Shapes: N rows (texts), T tokens, V vocabulary; ids are integers on any device, logits of the model's dtype on its own.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from oncelm.models.family import Family
from oncelm.models.registry import family, titles
from oncelm.models.session.base import READ_AT_ONCE, Session
from oncelm.models.session.own_cache import CacheSession
from oncelm.models.session.transformers_cache import TransformersSession

__all__ = ["READ_AT_ONCE", "CacheSession", "Session", "TransformersSession", "check_options", "open_session"]


def open_session(
    model: PreTrainedModel,
    rows: int = 1,
    room: int | None = None,
    chunk_size: int | None = None,
    *,
    cache_options: dict[str, Any] | None = None,
    read_options: dict[str, Any] | None = None,
) -> Session:
    """The session of a model, by its family; options as in `CacheSession`.

    Raises:
        ValueError: an option that the family does not take.
    """
    options = {"cache_options": cache_options or {}, "read_options": read_options or {}}
    check_options(model.config, **options)
    able = family(model.config)
    if chunk_size is not None and able.reads_by_windows:
        raise ValueError(f"chunk_size is not for {able.title} models: they read window by window.")
    if able.has_own_cache:
        return CacheSession(model, rows, room, chunk_size, **options)
    return TransformersSession(model, rows, room, chunk_size)


def check_options(config: PreTrainedConfig, cache_options: dict[str, Any], read_options: dict[str, Any]) -> None:
    """ValueError for options of a session that models of this configuration do not take."""

    def taken(able: type[Family]) -> set[str]:
        own = ("dtype", *able.cache_options) if able.has_own_cache else ()
        return {f"cache {name}" for name in own} | {f"read {name}" for name in able.read_options}

    for option in (*(f"cache {name}" for name in cache_options), *(f"read {name}" for name in read_options)):
        if option not in taken(family(config)):
            name = option.partition(" ")[2]
            able = titles(lambda one, option=option: option in taken(one))  # type: ignore[misc]
            those = f"for {able} models" if able else "no option of a session"
            raise ValueError(f"{name} is {those}; this is a model of type {config.model_type}.")
