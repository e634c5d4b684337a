"""benchmarks/memory_kinds.py on a small model."""

from __future__ import annotations

import json

import pytest

from oncelm.data.tokenizers import load_tokenizer
from tests.bench.test_longest_sequence import SCRIPTS
from tests.models.small import make_long


def test_every_kind_of_memory_is_measured(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("faiss", reason="needs `pip install faiss-cpu`")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import memory_kinds

    make_long(vocab_size=260).save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    out = tmp_path / "results.jsonl"
    command = [str(tmp_path), "moby_dick", "--following", "3", "--out", str(out), "--tokens"]
    memory_kinds.main([*command, "300"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["memory"] for line in lines] == ["exact", "cpu", "cpu", "disk", "knn", "knn", "knn"]
    exact, cpu, int8, disk, flat = lines[:5]
    assert exact["kl_to_exact"] == 0
    assert max(abs(line["kl_to_exact"]) for line in (cpu, disk, int8)) < 1e-6 < flat["kl_to_exact"]
    assert int8["bytes"] < cpu["bytes"]
    assert set(flat["recall"].values()) == {1.0}
    assert all(line["token_seconds"] > 0 and line["restore_seconds"] > 0 for line in lines)
    with pytest.raises(SystemExit):
        memory_kinds.main([*command, "9M"])
    assert "fewer than --tokens and --following" in capsys.readouterr().err
