"""Files to documents: every format, every malformed line, whatever pieces a file is cut into."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import sys
import time

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from oncelm.data import reading
from oncelm.data.reading import DamagedText, Document, Malformed, parse_record, read, read_text, sample_texts, scan

zstd = reading.zstd_module()


def documents(path) -> list[str]:
    return ["".join(item.parts) for piece in scan(path) for item in read(piece) if isinstance(item, Document)]


def problems(path) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for piece in scan(path) for item in read(piece) if isinstance(item, Malformed)]


PRINTABLE = st.characters(exclude_categories=("C", "Z"), include_characters=" ")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(PRINTABLE, min_size=1), min_size=1), st.integers(1, 200))
def test_pieces_of_any_size_give_every_line_once(tmp_path_factory, texts: list[str], size: int) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_BYTES", size)
        pieces = scan(path)
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == path.stat().st_size
        found = [item for piece in pieces for item in read(piece)]
    assert ["".join(item.parts) for item in found] == texts
    assert [item.line for item in found] == list(range(1, len(texts) + 1))


def test_large_lines_are_read_as_others_are(tmp_path, monkeypatch, write_jsonl) -> None:
    monkeypatch.setattr(reading, "_LARGE_LINE_BYTES", 30)
    monkeypatch.setattr(reading, "_PART_CHARACTERS", 7)
    texts = ["x" * length for length in (1, 17, 18, 19, 20, 21, 40, 1000)] + ["\u6f22\U0001f600" * 20]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert documents(path) == texts
    path.write_text(path.read_text().rstrip("\n"))
    assert documents(path) == texts


def test_the_checksum_is_of_a_piece_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"0123456789\nabcdefghij\n")
    before = [piece.sha256 for piece in scan(path)]
    path.write_bytes(b"0123456789\nabcdefghij\nmore\n")
    assert [piece.sha256 for piece in scan(path)][:2] == before


def test_every_format_gives_the_same_documents(tmp_path) -> None:
    texts = ["one", "two\n\u6f22\u5b57", "three " * 1000]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    # two gzip members and two zstd frames, as appending to a file makes them
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:30]) + gzip.compress(lines[30:]))
    assert documents(tmp_path / "a.jsonl") == documents(tmp_path / "a.jsonl.gz") == texts
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(lines[:30]) + zstd.compress(lines[30:]))
    assert documents(tmp_path / "a.jsonl.zst") == texts


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zstd.compress)])
@pytest.mark.parametrize("large", [5, 20, 22, 25, 1 << 20])  # 22, 25: the first line without the mark, and with it
def test_a_byte_order_mark_before_the_first_line_is_no_text(tmp_path, monkeypatch, suffix, compress, large) -> None:
    monkeypatch.setattr(reading, "_LARGE_LINE_BYTES", large)
    path = tmp_path / f"a.jsonl{suffix}"
    lines = codecs.BOM_UTF8 + b'{"text": "abcdefghi"}\n{"text": "two"}\n'
    path.write_bytes(compress(lines))
    assert documents(path) == ["abcdefghi", "two"]
    path.write_bytes(compress(lines + lines))  # elsewhere it is no JSON
    assert documents(path) == ["abcdefghi", "two", "two"]
    assert [line for line, _ in problems(path)] == [3]


def test_parquet_columns_are_documents(tmp_path) -> None:
    table = pyarrow.table({"id": [1, 2, 3], "content": ["one", None, "three"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert documents(tmp_path / "a.parquet") == ["one", "three"]
    assert problems(tmp_path / "a.parquet") == [(2, "content must be text, got NoneType")]
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "b.parquet")
    assert problems(tmp_path / "b.parquet") == [(0, "no column text or content or raw_content_lines among id")]
    (tmp_path / "c.parquet").write_bytes(bytes(range(256)) * 8)
    (((line, reason)),) = problems(tmp_path / "c.parquet")
    assert line == 0
    assert "the file is damaged" in reason


def test_a_parquet_row_without_text_has_it_in_another_column(tmp_path) -> None:
    columns = {
        "content": ["no", "two", "three", None],
        "text": ["one", None, "", None],
        "raw_content_lines": [["no"], ["no"], ["no"], ["fo", "ur"]],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=3)
    assert documents(tmp_path / "a.parquet") == ["one", "two", "three", "fo\nur"]
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(1), "content": ["body"]}), tmp_path / "b.parquet")
    assert documents(tmp_path / "b.parquet") == ["body"]
    for name, column in {"c": [b"\xff"], "d": pyarrow.array([b"text"], pyarrow.large_binary())}.items():
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        assert problems(tmp_path / f"{name}.parquet") == [(1, "text is binary; make the column one of text (string)")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("large", [20, 1 << 20])
def test_numbers_that_json_lacks_cost_no_document(tmp_path, monkeypatch, suffix, large) -> None:
    monkeypatch.setattr(reading, "_LARGE_LINE_BYTES", large)
    texts = ["a good document", 'NaN, "Infinity" and \\', "-Infinity\\n"]
    odd = [float("nan"), float("inf"), float("-inf")]
    records = [{"score": score, "text": text, "more": odd} for score, text in zip(odd, texts, strict=True)]
    path = tmp_path / f"a.jsonl{suffix}"
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}[suffix](lines))
    assert documents(path) == texts


@settings(max_examples=40)
@given(
    st.recursive(
        st.floats() | st.text(st.sampled_from('NaInfity-"\\{[,: ')) | st.none(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('Na"\\')), inner),
    )
)
def test_json_that_python_writes_is_read(value) -> None:
    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    assert parse_record(json.dumps(value).encode()) == finite(value)


@pytest.mark.parametrize("line", [b'{"text": "a", "b": -NaN}', b'{"text": "a NaN', b'{"text": nNaN}', b"NaN Infinity"])
def test_what_is_no_json_beside_a_nan_is_told_as_before(line) -> None:
    with pytest.raises(ValueError, match="not JSON: "):
        parse_record(line)


def test_a_long_broken_line_with_a_nan_is_looked_through_once() -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="not JSON"):
        parse_record(b'{"score": NaN, "text": "' + rb"\"" * (1 << 20))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"text": null, "content": "body"}', "body"),
        ('{"text": "", "content": "body"}', "body"),
        ('{"text": NaN, "content": "body"}', "body"),
        ('{"text": null, "content": null, "raw_content_lines": ["a", "b"]}', "a\nb"),
    ],
)
def test_a_line_without_text_has_it_in_another_field(tmp_path, line, text) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    assert documents(tmp_path / "a.jsonl") == [text]


def test_a_field_of_no_text_is_not_passed_over(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 5, "content": "body"}\n{"text": null, "content": ""}\n')
    assert problems(tmp_path / "a.jsonl") == [(1, "text must be text, got int"), (2, "text must be text, got NoneType")]


def test_other_fields_than_text_are_read(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one"}\n{"raw_content_lines": ["two", "three"]}\n{"text": "four", "content": "no"}\n')
    assert documents(path) == ["one", "two\nthree", "four"]


def test_every_malformed_line_is_told_with_its_reason(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "fine"}',
        b"",  # a blank line is none
        b"{",
        b'["text"]',
        b'{"id": 1}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": "caf\xe9"}',
        rb'{"text": "\ud800"}',
        b"[" * 100_000,
        b'{"raw_content_lines": [1]}',
        b'{"text": "fine too"}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert documents(path) == ["fine", "fine too"]
    found = problems(path)
    assert [line for line, _ in found] == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    for (_, reason), expected in zip(
        found,
        [
            "not JSON: unexpected end of data",
            "a JSON object is needed, got list",
            "no text or content or raw_content_lines among its keys (id)",
            "text must be text, got int",
            "text is empty",
            "not UTF-8: byte 0xe9 at offset 13 of the line",
            "not JSON",
            "not JSON",
            "raw_content_lines must be text, got list",
        ],
        strict=True,
    ):
        assert expected in reason


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "_LARGE_LINE_BYTES", 1 << 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (3 << 20) + b'"}\n{"text": "after"}\n')
    assert documents(path) == ["after"]
    assert problems(path) == [(1, "the line is longer than 1 MiB")]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd.compress)])
def test_a_damaged_archive_keeps_what_is_before_the_damage(tmp_path, suffix, compress) -> None:
    lines = "".join(json.dumps({"text": f"document {i * i}"}) + "\n" for i in range(50_000)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(lines)[:-5000])
    found = documents(path)
    assert 0 < len(found) < 50_000
    (((line, reason)),) = problems(path)
    assert line == len(found) + 1
    assert reason.startswith("the file is damaged")
    path.write_bytes(b"no archive at all")
    assert documents(path) == []
    assert problems(path)[0][1].startswith("the file is damaged")


def test_text_is_read_as_python_reads_it(tmp_path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert documents(path) == [read_text(path)] == ["one\ntwo\nthree\n"]


def test_text_that_is_none_is_told_by_its_first_bad_byte(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_PART_CHARACTERS", 1 << 10)
    path = tmp_path / "a.txt"
    path.write_bytes(("\u00e9" * (1 << 20)).encode()[1:])
    with pytest.raises(ValueError, match="not UTF-8 text: byte 0xa9 at offset 0; convert it"):
        read_text(path)
    good = ("x" + "\u00e9" * (1 << 20)).encode()
    path.write_bytes(good + b"\xff")
    with pytest.raises(DamagedText, match=f"byte 0xff at offset {len(good)}"):
        documents(path)
    path.write_bytes(good[:-1])
    with pytest.raises(DamagedText, match=f"a character is cut off at offset {len(good) - 2}"):
        documents(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_text(path)
    assert scan(path) == []


def test_progress_adds_up_to_the_bytes_read(tmp_path, write_jsonl) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x" * 100] * 50)
    (tmp_path / "a.txt").write_text("line\n" * 100)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for path in sorted(tmp_path.iterdir()):
        told: list[int] = []
        for piece in scan(path):
            for item in read(piece, told.append):
                "".join(item.parts)
        assert sum(told) == path.stat().st_size


def test_a_sample_of_text_takes_from_every_file_by_size(tmp_path, write_jsonl) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", ["ab" * n] * 20) for n in (10, 100)]
    assert "".join(sample_texts(files)) == "".join(text for file in files for text in documents(file))
    few = list(sample_texts(files, 1000))
    assert 900 < sum(map(len, few)) <= 1000
    assert few[0] == "ab" * 10
    assert "ab" * 100 in few


def test_missing_readers_say_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"pip install 'oncelm\[data\]'"):
        documents(tmp_path / "a.parquet")
