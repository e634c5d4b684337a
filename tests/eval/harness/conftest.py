"""lm-eval is optional; a small folder of questions in the plain format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def questions(tmp_path) -> Path:
    """Two tasks of YOCO's table: choices behind the query, and choices inside it."""
    arc = [
        {"query": f"Question: What is {a} and {a}?\nAnswer:", "choices": [str(a), str(2 * a), "a lot"], "gold": a % 3}
        for a in range(9)
    ]
    grande = [
        {"queries": [f"Ann met Bob {n} times as {x}" for x in ("Ann", "Bob")], "continuation": "asked.", "gold": n % 2}
        for n in range(6)
    ]
    write(tmp_path / "data/arc_easy/test.jsonl", arc)
    write(tmp_path / "data/arc_easy/train.jsonl", arc[::-1])
    write(tmp_path / "data/winogrande/validation.jsonl", grande)
    return tmp_path / "data"


def write(file: Path, lines: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
