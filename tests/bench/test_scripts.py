"""What scripts of benchmarks/ and recipes/ import of OnceLM is there: most need a GPU, so none runs here."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for folder in ("benchmarks", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]


def check(module: str, name: str) -> None:
    try:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":  # which not every machine has
            raise


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_its_imports_are_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "oncelm":
            for name in node.names:
                check(node.module, name.name)
