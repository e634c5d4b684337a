"""Which mixers there are, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from transformers.configuration_utils import remap_legacy_layer_types

from oncelm.utils.errors import shown, unknown

if TYPE_CHECKING:
    from oncelm.models.yoco.config import YocoConfig
    from oncelm.models.yoco.mixers.base import Mixer

Class = TypeVar("Class", bound="type[Mixer]")

CROSS_ATTENTION = "cross_attention"  # what a layer of the cross-decoder is called among them
# each in a file of that name, imported when it is asked for
BUILT_IN = ("gated_retention", "sliding_window", "full_attention", "gated_delta")
MIXERS: dict[str, type[Mixer]] = {}


def register_mixer(name: str) -> Callable[[Class], Class]:
    """A decorator that makes a subclass of Mixer known as `name`, in configurations and on the command line.

    Raises:
        ValueError: a name that another class has, or that transformers takes for another.
        TypeError: a decorator without its name, or a class that is no Mixer.
    """
    if not isinstance(name, str):
        raise TypeError(f'a mixer is registered under a name: write @register_mixer("name"), got {shown(name)}.')

    def register(cls: Class) -> Class:
        from oncelm.models.yoco.mixers.base import Mixer  # which reads this module

        if not (isinstance(cls, type) and issubclass(cls, Mixer)):
            raise TypeError(f"{shown(cls)} is not a subclass of oncelm.models.yoco.mixers.Mixer.")
        known = MIXERS.get(name)
        # the same class again is a notebook's cell run again
        is_same = known is None or (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        is_ours = cls.__module__ == f"{__package__}.{name}"
        if name == CROSS_ATTENTION or not is_same or (name in BUILT_IN and not is_ours):
            raise ValueError(f"there is a mixer {name!r} already; register {cls.__name__} under another name.")
        if not name.isidentifier() or (meant := remap_legacy_layer_types([name])) != [name]:
            why = f"transformers reads it as {meant[0]!r}" if name.isidentifier() else "it must be one word"
            raise ValueError(f"a mixer cannot be called {name!r}: {why}.")
        MIXERS[name] = cls
        return cls

    return register


def mixer_names() -> tuple[str, ...]:
    """All names, those of other people's mixers last.

    >>> mixer_names()[:2]
    ('gated_retention', 'sliding_window')
    """
    return (*BUILT_IN, *(name for name in MIXERS if name not in BUILT_IN))


def find_mixer(name: str) -> type[Mixer]:
    """The mixer of that name; ValueError, with the nearest, if there is none."""
    if name not in MIXERS and name in BUILT_IN:
        importlib.import_module(f"{__package__}.{name}")
    if name not in MIXERS:
        raise unknown("mixer", name, mixer_names())
    return MIXERS[name]


def mixers_of(config: YocoConfig) -> list[type[Mixer]]:
    """The mixer of each layer of the self-decoder."""
    return [find_mixer(name) for name in config.self_layer_types]


def kinds_of(config: YocoConfig) -> Iterable[type[Mixer]]:
    """Each mixer of the self-decoder once, in the order of its first layer."""
    return dict.fromkeys(mixers_of(config))
