"""Plots of figures against length."""

from __future__ import annotations

from pathlib import Path

import pytest

from oncelm.bench.plot import COMPARISON, plot_by_length


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"model": model, "length": length, **{panel.key: length * factor for panel in COMPARISON}}
        for length in (1024, 4096)
        for model, factor in (("YOCO", 1), ("Llama", 3))
    ]
    plot_by_length(rows, tmp_path / "plot.png", "a title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "plot.png"]
