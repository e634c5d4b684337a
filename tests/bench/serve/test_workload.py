"""Workload files and the generators of common ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from oncelm.bench.serve.generate import generate
from oncelm.bench.serve.workload import Conversation, Turn, read_workload, write_workload


@pytest.mark.parametrize(
    "spec",
    [
        "uniform:requests=5,input=16-4K,output=3,rate=2.5",
        "documents:documents=2,document=100-200,questions=3,input=4,output=2",
        "chat:conversations=3,turns=3,system=7,input=5,output=2-4,think=.5,rate=10",
    ],
)
def test_what_is_written_is_read(spec: str, tmp_path: Path) -> None:
    drawn = generate(spec, seed=3)
    assert drawn == generate(spec, seed=3)
    assert drawn != generate(spec, seed=4)
    write_workload(tmp_path / "w.jsonl", drawn)
    assert read_workload(tmp_path / "w.jsonl") == drawn
    assert all("think" not in json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines())


def test_what_generators_draw() -> None:
    requests = generate("uniform:requests=2000,input=16-4K,rate=50")
    lengths = [conversation.turns[0].input for conversation in requests]
    assert min(lengths) >= 16
    assert max(lengths) <= 4096
    assert np.median(lengths) == pytest.approx(256, rel=0.2)  # their geometric mean
    assert requests[0].arrival == 0
    assert requests[-1].arrival == pytest.approx(40, rel=0.2)
    asked = generate("documents:documents=3,document=10-1K,questions=4")
    assert len(asked) == 12
    assert len({(one.prefix, one.prefix_length) for one in asked}) == 3
    talks = generate("chat:conversations=2,turns=3,think=0")
    assert talks[0] == Conversation((Turn(256, 128),) * 3)
    assert generate("uniform")[0].num_tokens == 8192 + 256


def test_a_line_as_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(
        '{"input": 5, "output": 2}\n\n'
        '{"arrival": 2, "input": 4, "output": 6, "prefix": "a book", "prefix_length": 9, "priority": -1}\n'
        '{"input": "Once", "output": 3, "turns": [{"input": " more", "output": 1, "think": 5}]}\n'
    )
    assert read_workload(path) == [
        Conversation((Turn(5, 2),)),
        Conversation((Turn(4, 6),), 2, "a book", 9, -1),
        Conversation((Turn("Once", 3), Turn(" more", 1, 5))),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2 of .*: not a JSON object"),
        ("{", "line 2 of .*Expecting"),
        ('{"input": 5}', "output is missing"),
        ('{"input": 0, "output": 1}', "input must be a whole number of at least 1, got 0"),
        ('{"input": "", "output": 1}', "input must be text"),
        ('{"input": 5, "output": true}', "output must be a whole number"),
        ('{"input": 5, "output": 1, "arival": 2}', "did you mean 'arrival'"),
        ('{"input": 5, "output": 1, "arrival": -1}', "arrival must be"),
        ('{"input": 5, "output": 1, "arrival": NaN}', "arrival must be"),
        ('{"input": 5, "output": 1, "prefix": "a"}', "prefix and prefix_length go together"),
        ('{"input": "a", "output": 1, "prefix": "a", "prefix_length": 3}', "a shared text into the input"),
        ('{"input": 5, "output": 1, "turns": [{"input": "a", "output": 1}]}', "text in all turns"),
        ('{"input": 5, "output": 1, "turns": [{"input": 5, "output": 1, "thinks": 1}]}', "did you mean 'think'"),
        ('{"input": 5, "output": 1, "turns": 3}', "turns must be a list"),
    ],
)
def test_wrong_lines_teach(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text('{"input": 5, "output": 2}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_workload(tmp_path / "w.jsonl")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifrom", "did you mean 'uniform'"),
        ("uniform:request=3", "did you mean 'requests'"),
        ("uniform:requests=0", "requests must be a whole number of at least 1"),
        ("uniform:requests=2.5", "requests must be a whole number"),
        ("uniform:input=x", "input=x: a number, such as 20, 4096 or 128K, or a range"),
        ("uniform:input=5-3", "from the smaller to the larger"),
        ("uniform:requests=1-3", r"requests=1-3: a number, such as 20, 4096 or 128K\."),
        ("uniform:rate=-1", "rate=-1: a number"),
        ("uniform:input", "input=: a number"),
    ],
)
def test_wrong_workloads_teach(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(spec)


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no requests"):
        read_workload(tmp_path / "w.jsonl")
