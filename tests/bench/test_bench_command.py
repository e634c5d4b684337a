"""`oncelm bench` from the command line to the file."""

from __future__ import annotations

import json

import pytest
import torch

from oncelm import bench
from oncelm.bench import CASES, append_record, read_records, table
from oncelm.cache import SharedKV
from oncelm.cli import main
from oncelm.models.yoco.mixers.gated_retention import GatedRetention
from tests.models.test_longllama import make_llama

TINY = ["--hidden-size", "64", "--layers", "2", "--set", "vocab_size=97", "--device", "cpu", "--repeats", "1"]


@pytest.mark.parametrize("benchmark", list(CASES))
def test_every_benchmark_writes_records_and_a_table(benchmark, tmp_path, quick_ceilings, capsys):
    out = tmp_path / "figures.jsonl"
    arguments = [*TINY, "--lengths", "24,40", "--peer-max-length", "24", "--out", str(out)]
    assert main(["bench", benchmark, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Llama" in shown
    assert {"prefill": "TTFT", "decode": "TPOT"}.get(benchmark, "") in shown
    records = read_records(out)
    assert [(r["subject"], r["length"]) for r in records] == [("YOCO", 24), ("Llama", 24), ("YOCO", 40)]
    for record in records:
        assert record["benchmark"] == benchmark
        assert record["shape"]["vocab_size"] == 97
        assert record["parameters"] > 0
        assert record["environment"]["torch"] == torch.__version__
        if benchmark == "memory":
            assert record["cache_bytes"] > 0
        else:
            assert record["repeats"] == 1
            assert record["seconds"] > 0
            assert record["roofline_share"] == pytest.approx(max(record["mfu"], record["mbu"]))
        assert "kernels" not in record

    assert main(["bench", benchmark, *arguments]) == 0
    assert len(read_records(out)) == 6
    assert read_records(out)[:3] == records


@pytest.mark.parametrize("benchmark", ["prefill", "decode", "train"])
def test_a_mixer_that_does_not_say_its_work_is_timed(benchmark, tmp_path, quick_ceilings, capsys, monkeypatch):
    monkeypatch.setattr(GatedRetention, "work", classmethod(lambda cls, config: None))
    out = tmp_path / "figures.jsonl"
    assert main(["bench", benchmark, *TINY, "--lengths", "24", "--no-peer", "--out", str(out)]) == 0
    (record,) = read_records(out)
    assert record["seconds"] > 0
    assert "mfu" not in record
    assert "MFU" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", ["prefill", "decode", "train"])
def test_a_profile_is_kept_with_the_record(benchmark, tmp_path, quick_ceilings):
    out = tmp_path / "figures.jsonl"
    assert main(["bench", benchmark, *TINY, "--lengths", "24", "--no-peer", "--profile", "--out", str(out)]) == 0
    (record,) = read_records(out)
    assert record["kernels"]["aten::mm"][0] > 0
    assert sum(cost for _, cost in record["kernels"].values()) <= record["kernel_milliseconds"] * 1.01


@pytest.mark.parametrize("kv_dtype", ["float8", "int8"])
def test_a_cache_of_8_bits(kv_dtype, tmp_path, quick_ceilings):
    for options in ([], ["--kv-dtype", kv_dtype]):
        for benchmark in ("memory", "decode"):
            out = tmp_path / benchmark
            assert main(["bench", benchmark, *TINY, "--lengths", "200", "--no-peer", "--out", str(out), *options]) == 0
    for benchmark, figure in (("memory", "cache_bytes"), ("decode", "bytes")):
        full, narrow = read_records(tmp_path / benchmark)
        assert narrow["settings"]["kv_dtype"] != full["settings"]["kv_dtype"] == "float32"
        assert narrow[figure] < full[figure]


def test_a_folder_is_measured(tmp_path, quick_ceilings, capsys):
    from tests.bench.conftest import tiny_yoco

    tiny_yoco().model.save_pretrained(tmp_path / "model")
    command = ["bench", "memory", "--model", str(tmp_path / "model"), "--lengths", "16", "--no-peer"]
    assert main([*command, "--device", "cpu"]) == 0
    assert main([*command, "--layers", "2"]) == 2
    assert "--layers does not go with --model" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["prefill", "decode", "memory"])
def test_a_llama_folder_as_a_longllama_beside_itself(benchmark, tmp_path, quick_ceilings, capsys):
    make_llama().save_pretrained(tmp_path / "llama")
    command = ["bench", benchmark, "--model", str(tmp_path / "llama"), "--mem-layers", "1", "--device", "cpu"]
    assert main([*command, "--lengths", "64", "--repeats", "1", "--out", str(tmp_path / "out.jsonl")]) == 0
    long, plain = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (long["subject"], plain["subject"]) == ("LongLLaMA", "Llama")
    assert long["parameters"] == plain["parameters"]
    assert long["shape"]["mem_layers"] == [1]
    assert main([*command, "--kv-dtype", "float8"]) == 2
    assert "--kv-dtype float8 is not for LongLLaMA models: auto, bfloat16 or int8" in capsys.readouterr().err
    assert main([*command, "--prefill-chunk-size", "8"]) == 2
    assert "--prefill-chunk-size is not for LongLLaMA models" in capsys.readouterr().err
    for old, new in (("Yoco", "OwnTarget"), ("Llama", "PeerTarget")):
        with pytest.raises(ImportError, match=f"oncelm.bench.{old} is oncelm.bench.{new} now"):
            getattr(bench, old)
    assert main(["bench", "train", *command[2:]]) == 2
    assert "--mem-layers does not go with `oncelm bench train`" in capsys.readouterr().err


def test_a_target_out_of_memory_is_a_record(monkeypatch, tmp_path, quick_ceilings, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(CASES, "prefill", full)
    assert main(["bench", "prefill", *TINY, "--lengths", "16", "--out", str(tmp_path / "f.jsonl")]) == 0
    assert "memory" in capsys.readouterr().out
    assert [record["error"] for record in read_records(tmp_path / "f.jsonl")] == ["out of memory"] * 2


def test_a_red_gate_is_exit_status_1_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(SharedKV, "append", lambda self, k, v, batch: None)
    out = tmp_path / "f.jsonl"
    assert main(["bench", "prefill", *TINY, "--lengths", "16", "--out", str(out)]) == 1
    assert "nothing is measured" in capsys.readouterr().err
    assert out.read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefil"], "did you mean 'prefill'"),
        (["prefill", "--self-decoder", "gated_retension"], "did you mean 'gated_retention'"),
        (["prefill", "--set", "num_key_value_head=2"], "did you mean 'num_key_value_heads'"),
        (["prefill", "--set", "window_size"], "KEY=VALUE"),
        (["prefill", "--lengths", "4x"], "each of them must be a whole number above 0"),
        (["prefill", *TINY, "--lengths", "0"], "above 0, such as 20, 4096 or 128K; got '0'"),
        (["prefill", *TINY, "--prefill-chunk-size", "0"], "--prefill-chunk-size must be"),
        (["prefill", "--dtype", "bf16"], "did you mean 'bfloat16'"),
        (["prefill", "--model", "yoco-2b"], "unknown preset"),
        (["prefill", "--model", "yoco-tiny", "--hidden-size", "64"], "--hidden-size does not go with --model"),
        (["prefill", "--out", "no/such/folder.jsonl"], "No such file or directory"),
    ],
)
def test_bad_options_teach(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_records_survive_the_file(tmp_path):
    path = tmp_path / "r.jsonl"
    records = [{"length": 1, "seconds": 0.125, "shape": {"layout": "stacked"}, "driver": None}, {"length": 2}]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records
    with pytest.raises(ValueError, match="Out of range float"):
        append_record(path, {"seconds": float("nan")})
    assert read_records(path) == records
    path.write_text(json.dumps(records[0]) + "\n{half")
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


def test_the_table_compares_with_the_first_subject():
    shared = {
        "benchmark": "memory", "length": 8, "dtype": "float32", "batch_size": 1, "parameters": 1, "device": "cpu",
        "ceiling_flops_per_second": 1e9, "ceiling_bytes_per_second": 1e9, "peak_bytes_above_weights": 1 << 20,
        "cores_busy_elsewhere": 0.5,
        "environment": {"cpu": "a CPU", "threads": 1, "torch": "2", "transformers": "5"},
    }  # fmt: skip
    drawn = table([
        {**shared, "subject": "YOCO", "cache_bytes": 2 << 20},
        {**shared, "subject": "Llama", "cache_bytes": 5 << 20},
    ])  # fmt: skip
    assert "not a quiet machine" in str(drawn.caption)
    assert [list(column.cells)[1] for column in drawn.columns[:4]] == ["8", "Llama", "5.0 MiB", "2.5x"]
