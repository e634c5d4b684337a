"""N texts read by one model: read, step, score, mark, rewind, select.

    session = open_session(model, rows=1, room=1000)
    logits = session.read(prompt)  # [1, T] -> [1, V]
    place = session.mark()
    for _ in range(100):
        logits = session.step(logits.argmax(-1, keepdim=True))
    session.rewind(place)

Evaluation, benchmarks and the command line drive models through it. There are two kinds: `CacheSession` for OnceLM's
families, through their own caches, and `TransformersSession` for any other causal language model. What comes to drive a
model in another way, such as an engine, has the same methods.

Shapes: N rows (texts), T tokens, V vocabulary; ids are integers on any device, logits of the model's dtype on its own.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from oncelm.models.registry import family
from oncelm.models.session.base import READ_AT_ONCE, Session
from oncelm.models.session.own_cache import CacheSession
from oncelm.models.session.transformers_cache import TransformersSession

__all__ = ["READ_AT_ONCE", "CacheSession", "Session", "TransformersSession", "open_session"]


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
    kind = family(model.config)
    options = {"cache_options": cache_options or {}, "read_options": read_options or {}}
    for what, allowed in (("cache_options", ("dtype", *kind.cache_options)), ("read_options", kind.read_options)):
        for name in options[what]:
            if not kind.has_own_cache or name not in allowed:
                raise ValueError(f"{name} is no option of a {type(model).__name__}.")
    if kind.has_own_cache:
        return CacheSession(model, rows, room, chunk_size, **options)
    return TransformersSession(model, rows, room, chunk_size)
