"""The report is one valid page that needs nothing else, and shows what was measured."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from oncelm.eval import TASKS, Curves, Run, make_task, read_run, run, write_report
from oncelm.eval.chart import draw
from oncelm.eval.page import sections_of, shown_runs
from oncelm.eval.plot import write_pngs
from tests.eval.conftest import write_haystack

VOID = {"meta", "br", "line", "polyline", "input", "img", "link"}


class Checker(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def haystack(tmp_path_factory) -> str:
    return write_haystack(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def made(haystack, tmp_path_factory, language_models) -> tuple[Path, list[Run]]:
    folder, runs = tmp_path_factory.mktemp("runs"), []
    for kind in ("retention", "llama"):
        task = make_task(TASKS["needle"], lengths=(400, 512), depths=3, runs=2, haystack=haystack, max_new_tokens=6)
        runs.append(run(task, language_models(kind), folder / f"{kind}.jsonl"))
    task = make_task(TASKS["nll"], documents=haystack, max_tokens=300)
    return folder, [*runs, run(task, language_models("retention"), folder / "nll.jsonl")]


@pytest.fixture
def runs(made, tmp_path) -> list[Run]:
    """Runs that the test may change, and their files in its folder."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    return copy.deepcopy(made[1])


def test_a_page_of_runs(runs, tmp_path) -> None:
    sample = runs[0].samples[4]
    sample["output"] = "</script><script>alert(1)</script> & <b>"
    sample["scores"]["correct"] = 1.0
    runs[1].complete = False
    write_report(runs, tmp_path / "report.html", "A <title>")
    page = (tmp_path / "report.html").read_text()
    checker = check(page)
    assert "A &lt;title&gt;" in page
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page)  # nothing from elsewhere
    assert "alert(1)</script>" not in page
    assert page.count("(not finished)") == 1
    data = json.loads(page.split('id="runs">')[1].split("</script>")[0])
    assert data[0][4]["output"] == "</script><script>alert(1)</script> & <b>"
    assert [len(run) for run in data] == [12, 12, 1]
    buttons = [attributes for tag, attributes in checker.seen if tag == "button"]
    assert len(buttons) == 2 * 6
    chosen = [
        b
        for b in buttons
        if b["data-run"] == "0"
        and b["data-x"] == "400"
        and b["data-y"] == str(sample["tags"]["depth"]).removesuffix(".0")
    ]
    cell = [s for s in data[0] if s["tags"]["context_length"] == 400 and s["tags"]["depth"] == sample["tags"]["depth"]]
    assert len(chosen) == 1
    assert len(cell) == 2
    assert sum(tag == "svg" for tag, _ in checker.seen) == 2
    assert '<meta name="viewport"' in page


def test_a_finished_file_gives_the_same_page(runs, tmp_path) -> None:
    write_report(runs, tmp_path / "a.html")
    write_report([read_run(tmp_path / f"{name}.jsonl") for name in ("retention", "llama", "nll")], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


def test_published_rows_stand_apart(runs, tmp_path) -> None:
    for sample in runs[0].samples.values():
        sample["tags"] = {**sample["tags"], "context_length": 128 << 10, "needles": 2}
    runs[0].configuration["task"] = "multi-needle"
    write_report(runs[:1], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    check(page)
    assert re.search(r'<tr class="quoted"><td>YOCO-3B-1M</td><td>0\.98</td></tr>', page)
    assert "In italics: as published." in page


def test_a_task_that_nobody_knows_gets_a_table(runs, tmp_path) -> None:
    runs[0].configuration["task"] = "mine"
    ((_, (table,)),) = sections_of(runs[:1])
    assert table.header[:4] == ["model", "context_length", "depth", "needles"]
    write_report(runs[:1], tmp_path / "report.html")
    check((tmp_path / "report.html").read_text())


def test_pngs(runs, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    written = [path for name, views in sections_of(runs) for path in write_pngs(views, tmp_path / "png", name)]
    assert len(written) == len(set(written)) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_png_never_replaces_another_of_the_same_report(runs, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    ((name, views),) = sections_of(runs[:1])
    first, second = write_pngs([*views, *views], tmp_path, name)
    assert second.stem == f"{first.stem}-2"


def test_no_runs_or_no_samples(runs, tmp_path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "r.html")
    runs[1].samples.clear()
    with pytest.warns(UserWarning, match="needle on llama has no sample yet; left out"):
        write_report(runs, tmp_path / "r.html")
    assert "2 runs" in (tmp_path / "r.html").read_text()
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="at least one run with samples"):
        write_report(runs[1:2], tmp_path / "r.html")


def test_runs_of_one_model_are_told_apart(runs, tmp_path, haystack, language_models) -> None:
    other = make_task(TASKS["nll"], documents=haystack, max_tokens=200)
    again = run(other, language_models("retention"), tmp_path / "nll-200.jsonl")
    ((_, (table, windowed, _)),) = sections_of(shown_runs([runs[2], again]))
    names = ["retention (max_tokens 300)", "retention (max_tokens 200)"]
    assert [row[0] for row in table.rows] == list(windowed.series) == names
    ((_, (table, windowed, _)),) = sections_of(shown_runs([again, read_run(tmp_path / "nll-200.jsonl")]))
    assert list(windowed.series) == ["retention (run 1)", "retention (run 2)"]
    assert not (tmp_path / "r.html").exists()


def test_scorers_are_named_once() -> None:
    model = {"name": "tiny", "weights": "w"}
    sample = {"tags": {"task": "piqa"}, "scores": {"acc": 1.0}}
    made = []
    for scorer in ("oncelm", "hflm"):
        options = {"data": "d", "fewshot": 0, "only": "", "scorer": scorer}
        made.append(Run({"task": "yoco-table", "options": options, "model": model}, {}, {0: sample}))
    ((_, (table,)),) = sections_of(made)
    assert table.header[1:3] == ["tiny, by oncelm", "tiny, by hflm"]


@pytest.mark.slow
def test_tapping_a_cell_shows_its_samples(runs, tmp_path) -> None:
    """In a real browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    for number, sample in runs[1].samples.items():
        sample["output"] = f"answer-{number}"
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    tap = "document.querySelectorAll('table.map button')[7].click()"  # the second run's second
    digest = base64.b64encode(
        hashlib.sha256(tap.encode()).digest()
    ).decode()  # the page's policy allows no other script
    page = page.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{tap}</script></body>"
    )
    (tmp_path / "tapped.html").write_text(page)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/tapped.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    shown = set(re.findall(r"<pre>output: (answer-\d+)</pre>", dom))
    wanted = {
        f"answer-{number}"
        for number, sample in runs[1].samples.items()
        if sample["tags"]["context_length"] == 512 and sample["tags"]["depth"] == 0
    }
    assert shown == wanted
    assert len(wanted) == 2


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, 2.0), (2, 2.0)], [(4096, 1.5), (1 << 20, 0.25)]])
def test_curves_of_any_size(points) -> None:
    drawing = draw(Curves("t", "x", "y", {"<a>": points}))
    check(drawing)
    assert drawing.count("<circle") == len(points)
    assert "nan" not in drawing
