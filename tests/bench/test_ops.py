"""`oncelm bench ops`: gates that can be red, records, and the command line."""

from __future__ import annotations

import pytest
import torch

from oncelm.bench import OPS, Ceilings, GateError, ops, ops_cases, ops_table, read_records, run_ops
from oncelm.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the gate, one call a timing, no ceilings measured."""
    monkeypatch.setattr(ops, "measure_ceilings", lambda device, dtype: Ceilings(1e11, 1e10))
    monkeypatch.setattr(ops, "SHORTEST_RUN", 0.0)
    for name, make in list(OPS.items()):

        def small(make=make):
            case = make()
            case.sizes["cpu"] = case.sizes["gate"]
            return case

        monkeypatch.setitem(OPS, name, small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(OPS))
def test_every_op_is_checked_and_timed(name: str, dtype: torch.dtype) -> None:
    records = run_ops([name], device=CPU, dtype=dtype, repeats=1)
    assert [r["pass"] for r in records if r["subject"] == "oncelm"] == [
        "forward",
        *(["forward + backward"] if name != "decode_attention" else []),
    ]
    assert any(r["subject"] != "oncelm" for r in records) or name == "window_attention"  # whose peers are on GPUs
    for record in records:
        assert "error" not in record
        assert record["seconds"] > 0
        assert record["floor_seconds"] == max(record["flops"] / 1e11, record["bytes"] / 1e10)
        assert record["gate_errors"]["ours"]
        assert record["environment"]["torch"] == torch.__version__
    assert ops_table(records).row_count == len(records) + 1


@pytest.mark.parametrize("fault", ["output", "gradient", "nan"])
def test_a_red_gate_measures_nothing(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops_cases.window_attention

    def wrong(q, k, v, *, window_size, backend):
        if backend != "auto":
            return right(q, k, v, window_size=window_size, backend=backend)
        if fault == "output":
            return right(q, k, v, window_size=window_size + 1)
        if fault == "nan":
            return right(q, k, v, window_size=window_size) * torch.nan
        return right(q, k.detach() + 0 * k, v, window_size=window_size)

    monkeypatch.setattr(ops_cases, "window_attention", wrong)
    measured: list = []
    with pytest.raises(GateError, match=r"window_attention on cpu .* nothing is measured"):
        run_ops(
            ["linear_cross_entropy", "window_attention"], device=CPU, dtype=torch.float32, on_record=measured.append
        )
    assert not measured


def test_a_peer_that_fails_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    make = OPS["global_attention"]

    def fails(q, k, v):
        raise RuntimeError("no kernel")

    def broken(n):
        raise AttributeError("another version")

    def missing(n):
        raise ImportError("not installed")

    def with_peers():
        case = make()
        case.peers.clear()
        case.peers.update({"fails": lambda n: fails, "wrong": lambda n: lambda q, k, v: q})
        case.peers.update({"broken": broken, "missing": missing})
        return case

    monkeypatch.setitem(OPS, "global_attention", with_peers)
    records = run_ops(["global_attention"], device=CPU, dtype=torch.float32, repeats=1)
    errors = {r["subject"]: r.get("error") for r in records if r["pass"] == "forward"}
    assert errors == {
        "oncelm": None, "fails": "RuntimeError: no kernel", "wrong": errors["wrong"],
        "broken": "AttributeError: another version",
    }  # fmt: skip
    assert "differs from ours" in errors["wrong"]
    assert ops_table(records).row_count == len(records) + 1


def test_the_command(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ops.jsonl"
    command = ["bench", "ops", "--device", "cpu", "--repeats", "1", "--output", str(out)]
    assert main([*command, "--op", "linear_cross_entropy", "--op", "decode_attention"]) == 0
    assert "oncelm" in capsys.readouterr().out
    assert [r["op"] for r in read_records(out)][-1] == "decode_attention"
    monkeypatch.setattr(ops, "check_op", lambda *_: (_ for _ in ()).throw(GateError("red")))
    assert main(command) == 1
    assert "correctness gate: red" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--op", "window_atention"], "did you mean 'window_attention'"),
        (["ops", "--model", "yoco-3b"], "--model does not go with `oncelm bench ops"),
        (["prefill", "--op", "window_attention"], "--op does not go with `oncelm bench prefill`"),
        (["op"], "did you mean 'ops'"),
        (["ops", "--repeats", "0"], "repeats must be"),
    ],
)
def test_bad_options_teach(arguments: list[str], message: str, capsys) -> None:
    assert main(["bench", *arguments, *(["--device", "cpu"] if "--device" not in arguments else [])]) == 2
    assert message in capsys.readouterr().err
