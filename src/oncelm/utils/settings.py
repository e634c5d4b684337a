"""Settings as people write them: YAML and JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

MOST_PARTS = 100_000  # values in what is read


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number: YAML 1.1, which PyYAML reads, asks for 3.0e-4."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_json(text: str | bytes) -> Any:
    """json.loads, but what is nested too deeply is a ValueError like whatever else is no JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(file: Path, encoding: str = "utf-8") -> Any:
    """What a file holds; ValueError that names it where it is no JSON."""
    try:
        return parse_json(file.read_text(encoding=encoding))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def parse_yaml(text: str, source: str) -> Any:
    """What `text` says; ValueError that names `source` where it is no YAML.

    >>> parse_yaml("lr: 3e-4", "recipe 'a.yaml'")
    {'lr': 0.0003}
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # PyYAML raises what it meets: `!!bool x` a KeyError, `!!timestamp x` an AttributeError, 2001-13-01 a ValueError
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    _check_size(value, source)
    return value


def _check_size(value: Any, source: str) -> None:
    """ValueError for a value of more parts than settings have: `*names` make a short text endless, or as good as."""
    waiting, seen = [value], 0
    while waiting:
        part = waiting.pop()
        seen += 1
        if seen > MOST_PARTS:
            raise ValueError(f"{source} holds itself, or more than {MOST_PARTS:,} values.")
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list | tuple | set):
            waiting += part
