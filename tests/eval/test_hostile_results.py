"""A results file may come from anybody: whatever it holds is shown as text, or refused by file and line."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from oncelm.cli import main
from oncelm.cli.eval import print_views
from oncelm.eval import TASKS, read_run, write_report
from oncelm.eval.fields import LENGTH, LENGTHS, NUMBER, NUMBERS, SHARE, TEXT, WHOLE, Kind
from oncelm.eval.page import sections_of
from oncelm.eval.plot import write_pngs
from oncelm.eval.results import _check
from oncelm.eval.tasks.ruler_prompts import KINDS as RULER
from oncelm.eval.templating import source

VALUES = {NUMBER: 1.5, SHARE: 1.0, WHOLE: 3, LENGTH: 4096, TEXT: "text", NUMBERS: [2.0, 1.5], LENGTHS: [1, 2]}
HOSTILE: list[Any] = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title></textarea><img src=x onerror=alert(1)>",
    "\" onmouseover=\"alert(1)\" x='",
    "' onfocus='alert(1)",
    "<a href=\"javascript:alert(1)\">x</a>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% include 'x' %}$${x} %s {0}",
    "<!--", "]]>", "&lt;script&gt;", "\x00\x1b[31m\u2028", "[/bold][link=x]", "$\\frac$ _x", "../../../x",
    float("nan"), float("inf"), -1, 0, 10**30, 10**400, 1e308, -1e15, 1e15, True, None, [],
    [1], [[1]], {}, {"a": {"b": 1}},
]  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "scope", "type", "id", "title", "aria-pressed", "role",
    "aria-label", "viewbox", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "fill", "stroke", "stroke-width",
    "points", "text-anchor", "data-run", "data-x", "data-y", "data-x-tag", "data-y-tag",
}  # fmt: skip
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "i", "span", "section", "figure",
    "figcaption", "div", "table", "thead", "tbody", "tr", "th", "td", "button", "details", "summary", "svg", "line",
    "text", "polyline", "circle", "script",
}  # fmt: skip


class Page(HTMLParser):
    """The elements of a page with their attributes, and what stands in its scripts and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        if self.inside in self.raw:
            self.raw[self.inside].append(data)

    def handle_endtag(self, tag) -> None:
        self.inside = ""


def check_page(text: str) -> None:
    """Nothing in the page is there because data said so."""
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    assert {name for _, attributes in page.elements for name in attributes} <= ATTRIBUTES
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "runs"}, {}]
    data, script = page.raw["script"]
    json.loads(data)
    assert script == source("page.js")
    (style,) = page.raw["style"]
    assert style.startswith(source("page.css"))
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )


def value_of(kind: Kind) -> Any:
    return VALUES.get(kind, next(iter(RULER)) if "RULER" in kind.words else 1.5)


def records(name: str) -> list[dict[str, Any]]:
    """The lines of a run of a task: one sample of each of its own tasks, or one."""
    task = TASKS[name]
    model = {"name": "m", "type": "llama", "parameters": 10, "dtype": "float32", "weights": "w"}
    options = {"lengths": [1], "strict": True, "depths": 2, "fewshot": 0, "scorer": "auto", "data": "d"}
    environment = {"cpu": "c", "gpus": [{"name": "g"}], "torch": "2", "transformers": "5"}
    configuration = {"task": name, "options": options, "seed": 0, "model": model}
    run = {"kind": "run", "format": 1, "configuration": configuration, "time": "now", "device": "cuda:0"}
    tags = {tag: value_of(kind) for tag, kind in task.tag_kinds.items()}
    scores = {score: copy.deepcopy(value_of(kind)) for score, kind in task.score_kinds.items()}
    sample = {"kind": "sample", "index": 0, "prompt_hash": "h", "prompt_tokens": 9, "tags": tags, "target": "t"}
    sample |= {"output": "o", "scores": scores or {"acc": 1.0}}
    other = {**copy.deepcopy(sample), "index": 1}
    return [run | {"environment": environment}, sample, other, {"kind": "end", "samples": 2}]


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """A file whose checksums fit."""
    texts = [json.dumps(line) for line in lines]
    path.write_text("".join(f'{text[:-1]}, "check": "{_check(text)}"}}\n' for text in texts))


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(lines: list[dict[str, Any]], path: tuple, value: Any) -> list[dict[str, Any]]:
    lines = copy.deepcopy(lines)
    at: Any = lines
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return lines


def cases(name: str) -> Iterator[tuple[tuple, list[dict[str, Any]]]]:
    """Every value of the file replaced by each hostile one, left out, or given as a name."""
    lines = records(name)
    for path in places(lines[:2]):
        if len(path) == 1 or path[1] in ("kind", "format"):
            continue
        if path[0] == 0 and name != "passkey" and "options" not in path:
            continue  # what was run is the same for all tasks
        for value in HOSTILE:
            yield (*path, repr(value)[:40]), changed(lines, path, value)
        without = copy.deepcopy(lines)
        at: Any = without
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        yield (*path, "absent"), without
    for part in ("tags", "scores"):
        for text in HOSTILE[:16]:
            yield (part, text), changed(lines, (1, part, text), 1.0)


def show(path: Path, out: Path, name: str) -> bool:
    """Whether the file is shown; else it is refused in one line that names the place."""
    try:
        run = read_run(path)
        write_report([run], out, "Report")
        print_views(TASKS[name], run)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert re.match(rf"line \d+ of {re.escape(str(path))}\b", refusal), refusal
        assert "\n" not in refusal
        return False
    check_page(out.read_text())
    return True


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["passkey", pytest.param(None, marks=pytest.mark.slow)])
def test_every_field_of_every_task(name, tmp_path, capsys) -> None:
    path, out = tmp_path / "run.jsonl", tmp_path / "report.html"
    for task in [name] if name else TASKS:
        write(path, records(task))
        assert show(path, out, task), task
        shown = refused = 0
        for what, lines in cases(task):
            write(path, lines)
            try:
                told = show(path, out, task)
            except Exception as error:
                raise AssertionError((task, *what)) from error
            shown, refused = shown + told, refused + (not told)
        assert min(shown, refused) > 100
        capsys.readouterr()


def test_tags_in_headings_are_text(tmp_path) -> None:
    """Where the task is nobody's, its tags are headings."""
    lines = changed(records("needle"), (0, "configuration", "task"), "<script>alert(0)</script>")
    lines[1]["tags"] = {"depth": "<script>alert(1)</script>", "<script>alert(2)</script>": 1}
    write(tmp_path / "run.jsonl", lines)
    write_report([read_run(tmp_path / "run.jsonl")], tmp_path / "r.html", "<script>alert(3)</script>")
    page = (tmp_path / "r.html").read_text()
    check_page(page)
    assert all(f"&lt;script&gt;alert({i})&lt;/script&gt;" in page for i in range(4))


@pytest.mark.parametrize("tag", ["depth", "needles", "context_length"])
@pytest.mark.parametrize("value", ["<script>alert(1)</script>", [1], None, {}, "50"])
def test_the_command_refuses_wrong_types_in_one_line(tag, value, tmp_path, capsys) -> None:
    write(tmp_path / "run.jsonl", changed(records("needle"), (1, "tags", tag), value))
    assert main(["eval", "report", str(tmp_path / "run.jsonl"), "--out", str(tmp_path / "r.html")]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(rf"oncelm: error: line 2 of \S+run\.jsonl: {tag} of the tags must be a .*, got .*\n", told)
    assert not (tmp_path / "r.html").exists()


def test_a_last_line_of_wrong_types_is_not_taken_for_a_cut_one(tmp_path) -> None:
    write(tmp_path / "run.jsonl", changed(records("needle"), (1, "tags"), [])[:2])
    with pytest.raises(ValueError, match=r"line 2 of .*: tags of the sample must be an object, got \[\]"):
        read_run(tmp_path / "run.jsonl")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"kind": "run", "x": NaN, "check": ""}', '{"kind": "\\ud800", "check": ""}']
)
def test_lines_that_no_json_reader_takes(text, tmp_path) -> None:
    write(tmp_path / "run.jsonl", records("needle"))
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    (tmp_path / "run.jsonl").write_text("\n".join([lines[0], text, *lines[1:], ""]))
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged: it is no JSON"):
        read_run(tmp_path / "run.jsonl")


@pytest.mark.filterwarnings("error")
def test_pictures_of_any_names_stay_in_their_folder(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for value in ("../../../x", "$\\frac$", "_hidden", "x" * 3000, "[/b]<script>"):
        lines = changed(records("passkey"), (0, "configuration", "model", "name"), value)
        write(tmp_path / "run.jsonl", lines)
        run = read_run(tmp_path / "run.jsonl")
        for name, views in sections_of([run]):
            for prefix in (name, value):
                written = write_pngs(views, tmp_path / "a/b/c/d", prefix)
                assert len(written) == 2
                assert {path.parent for path in written} == {tmp_path / "a/b/c/d"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "run.jsonl"}


def test_png_is_refused_before_the_page_is_written(tmp_path, capsys, monkeypatch) -> None:
    write(tmp_path / "run.jsonl", records("needle"))
    command = ["eval", "report", str(tmp_path / "run.jsonl"), "--out", str(tmp_path / "r.html"), "--png"]
    assert main([*command, str(tmp_path / "run.jsonl")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main([*command, str(tmp_path / "figures")]) == 2
    assert capsys.readouterr().err == "oncelm: error: PNGs need matplotlib: pip install 'oncelm[plot]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]
