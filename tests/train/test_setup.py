"""A run in a few lines of Python: those of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oncelm.data.tokens import open_tokens
from oncelm.train.config import TrainConfig
from oncelm.train.setup import make_trainer

DOCS = Path(__file__).parents[2] / "docs"
RECIPE = "steps: 2\nseq_len: 16\nbatch_size: 2\nmodel: yoco-tiny\n"


@pytest.fixture
def books(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with books/."""
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    Path("books/a.txt").write_text("".join(f"It was day {i} in April, and the clocks struck.\n" for i in range(4000)))
    return tmp_path


@pytest.mark.parametrize("page", ["training.md", "data.md"])
def test_what_the_documentation_shows_runs(books, page) -> None:
    Path("recipes").mkdir()
    Path("recipes/tiny-cpu.yaml").write_text(RECIPE)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(block, names)
    if page == "training.md":
        assert names["result"].model_path == Path("runs/books/model")
        assert names["config"].lr == 3e-4
    else:
        assert open_tokens("tokens").train[0].stream.num_tokens == names["tokens"].train[0].stream.num_tokens
        assert names["batch"].tokens.shape == (16, 2048)


def test_several_processes_are_to_meet_first(books, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give make_trainer the mesh of `join_mesh`"):
        make_trainer(TrainConfig(data="books", out="run"))
