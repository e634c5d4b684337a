"""What the documentation says can be run, runs; what it links to is there."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import oncelm
from oncelm.bench import Ceilings
from oncelm.engine.options import EngineOptions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


MODULES_WITH_EXAMPLES = [path for path in sorted((ROOT / "src").rglob("*.py")) if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", MODULES_WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


def test_each_verb_from_python(tmp_path: Path, monkeypatch) -> None:
    """The blocks of docs/python.md, one after the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("oncelm.bench.runner.measure_ceilings", lambda *_: Ceilings(1e11, 1e10))  # takes seconds
    Path("books").mkdir()
    Path("books", "a.txt").write_text("It was the best of times, it was the worst of times.\n" * 200)
    names: dict[str, object] = {}
    for block in code_blocks("python", "docs/python.md"):
        assert len([line for line in block.splitlines() if line and "import" not in line]) <= 5
        exec(block, names)
    assert Path("report.html").exists()


def make_model(folder: str) -> None:
    """A small one with its tokenizer, as `oncelm train` leaves them."""
    oncelm.build_model("yoco-tiny", vocab_size=260).save_pretrained(folder)
    oncelm.load_tokenizer("bytes").save_pretrained(folder)


def test_the_engine(tmp_path: Path, monkeypatch) -> None:
    """The Python blocks of docs/engine.md, one after the other."""
    monkeypatch.chdir(tmp_path)
    make_model("runs/books/model")
    names: dict[str, object] = {}
    for block in code_blocks("python", "docs/engine.md"):
        if "structured" in block and importlib.util.find_spec("llguidance") is None:
            continue
        exec(block, names)


@pytest.mark.parametrize("options", [EngineOptions, oncelm.SamplingParams], ids=lambda options: options.__name__)
def test_the_engines_tables_have_every_option(options: type) -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/engine.md").read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in dataclasses.fields(options)} <= named


def test_the_engines_page_names_every_file_of_it() -> None:
    text = (ROOT / "docs/engine.md").read_text()
    files = {path.name for path in (ROOT / "src/oncelm/engine").glob("*.py")} - {"__init__.py"}
    assert {name for name in files if f"`{name}`" not in text} == set()


@pytest.mark.slow
def test_readme_commands_and_python(tmp_path: Path) -> None:
    """Every `oncelm` line and every Python block of the README, in order, in an empty folder."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("It was the best of times, it was the worst of times.\n" * 200)
    (tmp_path / "book.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 50)
    ran = run_commands("\n".join(code_blocks("sh")), tmp_path)
    for block in code_blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        ran += 1
    assert ran >= 5


@pytest.mark.slow
def test_the_engines_commands(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_model("runs/books/model")
    Path("book.txt").write_text("Call me Ishmael. " * 20)
    assert run_commands("\n".join(code_blocks("sh", "docs/engine.md")), tmp_path) >= 2


def run_commands(lines: str, folder: Path) -> int:
    """Run each `oncelm` line but the demo: how many there were."""
    ran = 0
    for line in lines.splitlines():
        command = line.split("#")[0].strip()
        if not command.startswith("oncelm ") or command == "oncelm demo":
            continue
        program = Path(sys.executable).parent / "oncelm"
        done = subprocess.run([program, *shlex.split(command)[1:]], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    return ran
