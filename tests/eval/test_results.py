"""A result file survives being cut anywhere, and tells of every other damage."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oncelm.eval.results import open_run, read_run

HEADER = {"configuration": {"task": "t", "options": {"lengths": (1, 2)}, "model": {"name": "m"}}, "time": "now"}


def sample(index: int) -> dict:
    return {"index": index, "output": f"h\u00e9 {index}\n", "scores": {"x": 0.1 * index}}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.jsonl"
    with open_run(file, HEADER) as results:
        for index in range(3):
            results.add(sample(index))
    return file


def test_what_was_written_is_read(path) -> None:
    run = read_run(path)
    assert list(run.samples.values()) == [sample(i) for i in range(3)]
    assert run.configuration["options"]["lengths"] == [1, 2]
    assert not run.complete
    with open_run(path, HEADER) as results:
        results.append({"kind": "end", "samples": 3})
    assert read_run(path).complete


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_cut_anywhere_it_goes_on(data, tmp_path) -> None:
    file = tmp_path / "cut.jsonl"
    file.unlink(missing_ok=True)
    with open_run(file, HEADER) as results:
        for index in range(3):
            results.add(sample(index))
    raw = file.read_bytes()
    cut = data.draw(st.integers(0, len(raw)))
    file.write_bytes(raw[:cut])
    with open_run(file, HEADER) as results:
        kept = set(results.run.samples)
        for index in range(3):
            if index not in kept:
                results.add(sample(index))
    assert kept == set(range(raw[:cut].count(b"\n") - 1)) if b"\n" in raw[:cut] else not kept
    assert file.read_bytes() == raw


def test_damage_elsewhere_names_the_line_and_changes_nothing(path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    for damage, reason in (
        (lines[2].replace(b"0.1", b"0.9"), "checksum"),
        (b'{"kind": "sample"}\n', "no line of a result file"),
        (b"\0\0\0\n", "no JSON"),
        (lines[1], "there twice"),
    ):
        broken = b"".join([*lines[:2], damage, *lines[3:]])
        path.write_bytes(broken)
        for call in (lambda: read_run(path), lambda: open_run(path, HEADER).__enter__()):
            with pytest.raises(ValueError, match=rf"line 3 of .* is damaged: .*{reason}"):
                call()
        assert path.read_bytes() == broken


def test_a_bad_last_line_is_removed(path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"\0\0\0\0\n"]))
    with open_run(path, HEADER) as results:
        assert list(results.run.samples) == [0, 1]
    assert path.read_bytes() == b"".join(lines[:3])


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"kind": "other"}\n', '{"text": 1}'])
def test_another_file_is_left_alone(content, tmp_path) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="line 1 of"), open_run(file, HEADER):
        pass
    assert file.read_text() == content


def test_another_configuration_is_refused_with_the_difference(path) -> None:
    before = path.read_bytes()
    other = {**HEADER, "configuration": {**HEADER["configuration"], "options": {"lengths": (1, 3)}}}
    message = r"its options.lengths is \[1, 2\], this one's \[1, 3\]"
    with pytest.raises(ValueError, match=message), open_run(path, other):
        pass
    assert path.read_bytes() == before


def test_a_run_without_samples_makes_room_for_another(tmp_path) -> None:
    file = tmp_path / "run.jsonl"
    file.touch()
    with pytest.raises(ValueError, match=r"run\.jsonl is empty"):
        read_run(file)
    with pytest.raises(RuntimeError), open_run(file, HEADER):
        raise RuntimeError("before the first sample")
    other = {**HEADER, "configuration": {**HEADER["configuration"], "seed": 1}}
    with open_run(file, other) as results:
        results.add(sample(0))
    assert read_run(file).configuration["seed"] == 1
    with pytest.raises(ValueError, match="belongs to another run"), open_run(file, HEADER):
        pass


def test_two_writers_are_one_too_many(path) -> None:
    refused = pytest.raises(ValueError, match="being written by another process")
    with open_run(path, HEADER), refused, open_run(path, HEADER):
        pass


def test_what_is_no_number_is_never_written(path) -> None:
    before = path.read_bytes()
    with open_run(path, HEADER) as results, pytest.raises(ValueError, match="Out of range"):
        results.add(sample(3), {"index": 4, "scores": {"x": float("nan")}})
    assert path.read_bytes() == before
