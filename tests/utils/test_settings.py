"""YAML as people write it, and as nobody should."""

from __future__ import annotations

import pytest

from oncelm.utils.settings import parse_yaml


def test_numbers() -> None:
    assert parse_yaml("[3e-4, 1e4, 2.5, 7, -1E+2]", "x") == [3e-4, 1e4, 2.5, 7, -100.0]
    assert parse_yaml("base: &b {lr: 1}\nother: *b", "x") == {"base": {"lr": 1}, "other": {"lr": 1}}


LAUGHS = "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'ha'] * 10)}]" for i in range(10)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not valid YAML"),
        ("[" * 100_000, "nested too deeply"),
        ("? " * 5000 + "a", r"nested too deeply|not valid"),
        ("&a [*a]", "holds itself"),
        (LAUGHS, "more than 100,000 values"),
        ("!!bool x", "not valid YAML"),
        ("!!timestamp x", "not valid YAML"),
        ("!!python/object:os.system x", "not valid YAML"),
        ("!!int 0b", "not valid YAML"),
        ("2001-13-41", "not valid YAML"),
        ("{[1]: 2}", "not valid YAML"),
        ("9" * 5000, "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_is_no_yaml_is_named(text, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text, "recipe 'r.yaml'")
    assert "recipe 'r.yaml'" in str(error.value)
    assert "\n" not in str(error.value)
