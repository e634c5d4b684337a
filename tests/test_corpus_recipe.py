"""The corpus recipe: pinned, without what is held out, and readers that keep what they should."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[1] / "recipes" / "corpus"
HELD_OUT = ("django", "networkx", "sympy", "python3.11-doc", "r-cran-janeaustenr", "python-django-doc")
HELD_OUT += ("python-networkx-doc", "python-sympy-doc")


@pytest.fixture
def documents(monkeypatch):
    pytest.importorskip("selectolax")
    monkeypatch.syspath_prepend(str(RECIPE))
    import documents

    yield documents
    del sys.modules["documents"]


def test_every_package_is_pinned_and_none_is_held_out() -> None:
    wheels = (RECIPE / "python.txt").read_text().splitlines()
    debs = (RECIPE / "debian.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in wheels)
    assert all(re.fullmatch(r"[a-z0-9.+-]+=\S+", line) for line in debs)
    names = [line.split("=")[0] for line in wheels + debs]
    assert len(set(names)) == len(names) > 130
    assert not set(names) & set(HELD_OUT)
    validation = re.search(r"VALIDATION = \{(.*?)\}", (RECIPE / "build.py").read_text())
    assert validation is not None
    assert set(re.findall(r'"([^"]+)"', validation[1])) < set(names)


def test_a_wheel_is_one_document_of_its_code(tmp_path, documents) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    code = "print('hello, world')\n" * 3
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("b/z.py", code)
        archive.writestr("b/copy.py", code)
        archive.writestr("b/a.py", code + "# more\n")
        archive.writestr("b/data.py", "x" * 3000)
        archive.writestr("b/image.png", code)
        archive.writestr("a-1.dist-info/METADATA", "Name: a\nLicense-Expression: MIT\n\nText\n")
        archive.writestr("a-1.dist-info/x.py", code + "# not code of the package\n")
    document = documents.wheel_document(wheel)
    assert document.files == 2
    assert document.licence == "MIT"
    assert re.findall(r"# FILE: (\S+)", document.text) == ["b/a.py", "b/copy.py"]


def test_pages_are_text_without_navigation_or_repeats(tmp_path, documents) -> None:
    prose = "This is the text of the page, and it is in English, as you can see from the words that are in it. " * 8
    page = f"<html><body><nav>menu</nav><main><p>{{}}</p>\n<p>{prose}</p>\n<script>x</script></main></body></html>"
    (tmp_path / "a.html").write_text(page.format("First."))
    (tmp_path / "b.html").write_text(page.format("Second. " + prose.replace("page", "other page")))
    (tmp_path / "c.txt").write_text("Ein Text, der nicht auf Englisch geschrieben ist, und zwar deutlich. " * 20)
    (tmp_path / "changelog.txt").write_text(prose)
    document = documents.debian_document(tmp_path)
    assert document.files == 2
    assert document.text.count("text of the page") == 8
    assert "menu" not in document.text
    assert "Englisch" not in document.text
