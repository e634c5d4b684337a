"""`oncelm bench needle`: the grid's time beside that of a prefill of the tokens that it read."""

from __future__ import annotations

import pytest

from oncelm.bench import read_records
from oncelm.cli import main


def test_records_and_a_table(tmp_path, capsys) -> None:
    out = tmp_path / "r.jsonl"
    model = ["--hidden-size", "64", "--layers", "2", "--tokenizer", "bytes", "--device", "cpu", "--repeats", "1"]
    grid = ["--lengths", "300,400", "--depths", "3", "--runs", "2"]
    assert main(["bench", "needle", *model, *grid, "--out", str(out)]) == 0
    assert "needle grids, 3 depths x 2 runs" in capsys.readouterr().out
    records = read_records(out)
    assert [record["length"] for record in records] == [300, 400]
    for record in records:
        assert record["samples"] == 6
        assert 280 <= record["tokens_read"] < 6 * record["length"]  # what prompts share is read once
        spent = record["read_seconds"] + record["answer_seconds"]
        assert 0 < spent < record["seconds"]
        share = record["tokens_read"] / record["length"] * record["prefill_seconds"] / record["seconds"]
        assert record["prefill_share"] == pytest.approx(share)
