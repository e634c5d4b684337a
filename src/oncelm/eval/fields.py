"""What the fields of a result file may be. A file may come from anywhere, so it is checked before anything is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

LARGEST = 1e15  # no figure of a run is larger; what is drawn stays within floats


@dataclass(frozen=True)
class Kind:
    """A kind of value: in words, and the test of it. A field that is not needed may be absent."""

    words: str
    fits: Callable[[Any], bool]
    needed: bool = True


Kinds = Mapping[str, Kind]


def is_number(value: Any) -> bool:
    """Neither NaN nor infinite, nor too large to be drawn."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


NUMBER = Kind("a number", is_number)
SHARE = Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
WHOLE = Kind("a whole number of at least 0", lambda value: is_whole(value, 0))
LENGTH = Kind("a whole number of at least 1", lambda value: is_whole(value, 1))
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXT_OR_NONE = Kind("a text or null", lambda value: value is None or isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NUMBERS = Kind("a list of numbers", lambda value: isinstance(value, list) and all(map(is_number, value)))
LENGTHS = Kind(
    "a list of whole numbers of at least 1",
    lambda value: isinstance(value, list) and all(is_whole(one, 1) for one in value),
)
TAG = Kind("a number or a text", lambda value: isinstance(value, str) or is_number(value))
SCORE = Kind("a number or a list of numbers", lambda value: is_number(value) or NUMBERS.fits(value))
GPUS = Kind(
    "a list of objects with names",
    lambda value: isinstance(value, list) and all(OBJECT.fits(gpu) and TEXT.fits(gpu.get("name")) for gpu in value),
)

RUN = {"configuration": OBJECT, "environment": OBJECT, "device": TEXT, "time": TEXT}
CONFIGURATION = {"task": TEXT, "options": OBJECT, "seed": WHOLE, "model": OBJECT}
MODEL = {"name": TEXT, "type": TEXT, "parameters": WHOLE, "dtype": TEXT, "weights": TEXT}
ENVIRONMENT = {"cpu": TEXT, "gpus": GPUS, "torch": TEXT, "transformers": TEXT}
SAMPLE = {
    "index": WHOLE, "prompt_hash": TEXT, "prompt_tokens": WHOLE, "tags": OBJECT, "target": TEXT_OR_NONE,
    "output": TEXT_OR_NONE, "scores": OBJECT,
}  # fmt: skip
TIMES = {"tokens_read": WHOLE, "read_seconds": NUMBER, "answer_seconds": NUMBER, "seconds": NUMBER}


def optional(kind: Kind) -> Kind:
    """The same, of a field that may be absent."""
    return replace(kind, needed=False)


def check_fields(what: str, values: Mapping[str, Any], kinds: Kinds, needed: bool = True) -> None:
    """ValueError that names the first field that is of another kind, or absent where all are needed."""
    for name, kind in kinds.items():
        if name in values:
            if not kind.fits(values[name]):
                raise ValueError(f"{name} of the {what} must be {kind.words}, got {_shown(values[name])}.")
        elif needed and kind.needed:
            raise ValueError(f"the {what} has no {name}.")


def check_header(record: Mapping[str, Any], needed: bool = False) -> None:
    """ValueError unless a run's line has what every reader needs; with `needed`, all that a report says of a run."""
    check_fields("run", record, RUN, needed)
    configuration = record.get("configuration")
    if configuration is None:
        raise ValueError("the run has no configuration.")
    check_fields("configuration", configuration, CONFIGURATION, needed)
    for name in ("task", "options", "model"):
        if name not in configuration:
            raise ValueError(f"the configuration has no {name}.")
    model = configuration["model"]
    check_fields("model", model, MODEL, needed)
    if "name" not in model:
        raise ValueError("the model has no name.")
    check_fields("environment", record.get("environment", {}), ENVIRONMENT, needed)


def check_sample(sample: Mapping[str, Any], needed: bool = False) -> None:
    """ValueError where a sample's fields are of other kinds; with `needed`, also where one is absent."""
    check_fields("sample", sample, SAMPLE, needed)
    check_fields("sample", sample, TIMES, needed=False)
    if "index" not in sample:
        raise ValueError("the sample has no index.")
    for part, kind in (("tags", TAG), ("scores", SCORE)):
        values = sample.get(part, {})
        check_fields(part, values, dict.fromkeys(values, kind))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
