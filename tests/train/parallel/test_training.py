"""A run on several ranks: the losses of one, resumed on any number, and nothing saved is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import oncelm.models
from oncelm.cli import main
from oncelm.train.checkpoint import find_checkpoint, list_checkpoints
from tests.train.parallel.cases import die, die_while_saving, full_disk, is_learned, make_model, stop, train
from tests.train.ranks import KILLED, run_ranks

SMALL = {"num_self_decoder_layers": 1, "num_cross_decoder_layers": 1}
SHAPES = {
    "retention": {**SMALL, "tie_word_embeddings": True},
    "window": {**SMALL, "self_decoder": "sliding_window", "window_size": 5},
    "llama": {"llama": True},
    "long": {
        **{"mem_layers": [1], "max_position_embeddings": 16, "last_context_length": 8},
        **{"cross_batch_range": 3, "cross_batch_stepping": True, "dataset_packing": 2, "mem_dtype": None},
    },
}


@pytest.fixture
def options(tmp_path):
    def make(out: str = "run", **changed) -> dict:
        defaults = {
            **{"data": "unused", "out": str(tmp_path / out), "seq_len": 16, "batch_size": 4, "steps": 6},
            **{"warmup_steps": 2, "lr": 1e-2, "log_every": 1, "save_every": 2, "eval_every": 3, "eval_batches": 3},
        }
        return defaults | changed

    return make


def logged(options: dict, name: str = "loss") -> dict[int, float]:
    lines = map(json.loads, (Path(options["out"]) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def run(size: int, options: dict, shape: str = "retention", *event) -> list[str]:
    return run_ranks(size, train, options, SHAPES[shape], *event, fresh=bool(event) and event[-1] is not stop)


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ("retention", {}),
        ("llama", {}),
        ("long", {"crossbatch_rows": 2}),
        ("window", {"context_parallel": 2}),
        pytest.param("retention", {"context_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("retention", {"tensor_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("window", {"tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_norms_and_evaluations_of_one_rank(options, shape: str, split: dict) -> None:
    one = options("one", grad_accumulation=2, grad_clip=0.5, crossbatch_rows=split.get("crossbatch_rows"))
    two = options("two", grad_accumulation=2, grad_clip=0.5, activation_checkpointing=True, **split)
    assert run(1, one, shape) == ["ended at 6"]
    assert run(2, two, shape) == ["ended at 6"] * 2
    for value in ("loss", "grad_norm", "validation_loss"):
        assert logged(two, value) == pytest.approx(logged(one, value), rel=1e-3)
    assert logged(two, "lr") == logged(one, "lr")


@pytest.mark.slow
def test_all_three_ways_together_in_bfloat16(options) -> None:
    one, eight = (options(name, dtype="bfloat16") for name in ("one", "eight"))
    run(1, one)
    assert run(8, eight | {"tensor_parallel": 2, "context_parallel": 2}) == ["ended at 6"] * 8
    assert logged(eight) == pytest.approx(logged(one), rel=0.02)


@pytest.mark.parametrize("split", [{}, {"context_parallel": 2}], ids=str)
def test_conversations_have_the_losses_of_one_rank(options, split: dict) -> None:
    one, two = (options(name, task="sft", grad_accumulation=2, batch_size=2) for name in ("one", "two"))
    assert run(1, one) == ["ended at 6"]
    assert run(2, two | split) == ["ended at 6"] * 2
    for value in ("loss", "grad_norm", "validation_loss"):
        assert logged(two, value) == pytest.approx(logged(one, value), rel=1e-3)


def test_crossbatch_is_not_split_inside_a_forward_pass(options) -> None:
    """Its rows see each other: on two ranks they would see fewer."""
    (one, other) = run(2, options(batch_size=8, crossbatch_rows=2), "long")
    assert "each process takes whole ones: the 1 of a step (grad_accumulation) do not divide among 2" in one
    assert other == one


def test_one_two_and_one_rank_in_turn_see_the_same_batches(options) -> None:
    whole, parts = options("whole"), options("parts", resume=True)
    run(1, whole)
    assert run(1, parts, "retention", 0, 1, stop) == ["stopped at 2"]
    assert run(2, parts, "retention", 0, 3, stop) == ["stopped at 4"] * 2
    assert run(1, parts) == ["ended at 6"]
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-3)


@pytest.mark.parametrize(
    "split",
    [
        {},
        pytest.param({"context_parallel": 2}, marks=pytest.mark.slow),
        pytest.param({"tensor_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stopped_on_any_rank_and_resumed_it_equals_an_uninterrupted_run_bitwise(options, split: dict) -> None:
    whole, parts = options("whole", **split), options("parts", **split)
    run(2, whole)
    assert run(2, parts, "retention", 1, 2, stop) == ["stopped at 3"] * 2
    assert find_checkpoint(Path(parts["out"]) / "checkpoints").name == "step-000003"
    assert run(2, parts | {"resume": True}) == ["ended at 6"] * 2
    for name in ("loss", "grad_norm", "validation_loss"):
        assert logged(parts, name) == logged(whole, name)


def test_all_ranks_end_at_the_target_loss(options) -> None:
    whole = options("whole")
    run(2, whole)
    target = logged(whole, "validation_loss")[3] + 1e-3
    early = options("early", target_loss=target)
    run(2, early)
    assert max(logged(early)) == 3
    assert (Path(early["out"]) / "model").is_dir()
    # where they do not agree on the last bit, the first one is followed
    assert run_ranks(2, is_learned, early, [target, target + 1e-12]) == [True, True]


def test_a_rank_that_dies_ends_the_run_and_loses_nothing_saved(options) -> None:
    survivor, victim = run(2, options(), "retention", 1, 5, die)
    assert victim == KILLED
    assert survivor.startswith("ConnectionError: rank 0 lost another rank")
    assert "go on with --resume" in survivor
    assert run(2, options(resume=True)) == ["ended at 6"] * 2


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_dies_while_saving_leaves_the_checkpoint_before(options, rank: int) -> None:
    assert run(2, options(), "retention", rank, 3, die_while_saving)[rank] == KILLED
    checkpoints = Path(options()["out"]) / "checkpoints"
    assert find_checkpoint(checkpoints).name == "step-000002"
    assert run(2, options(resume=True)) == ["ended at 6"] * 2
    assert not list(checkpoints.glob(".*"))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_disk_that_fills_leaves_the_checkpoint_before(options, rank: int) -> None:
    for ending in run(2, options(), "retention", rank, 3, full_disk):
        assert ending.startswith("OSError: cannot write")
        assert "step-000004" in ending
        assert f"rank {rank}: [Errno 28] No space left on device" in ending
    checkpoints = Path(options()["out"]) / "checkpoints"
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-000002"]
    assert run(1, options(resume=True)) == ["ended at 6"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(options) -> None:
    run(2, options())
    losses = logged(options())
    part = next((Path(options()["out"]) / "checkpoints" / "step-000006" / "optimizer").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    assert run(2, options(resume=True)) == ["ended at 6"] * 2
    assert logged(options()) == losses


def test_the_first_rank_says_what_is_wrong(options) -> None:
    run(2, options())
    first, second = run(2, options())
    assert "already holds checkpoints" in first
    assert second == "SystemExit: 2"
    assert "do not divide among 2 processes" in run(2, options(batch_size=3))[1]
    for split in ("tensor_parallel", "context_parallel"):
        assert f"{split} is for YOCO models" in run(2, options(split, **{split: 2}), "llama")[1]
    assert "must divide the number of processes, 2" in run(2, options(tensor_parallel=3))[1]


def test_a_checkpoint_of_another_model_is_an_error(options) -> None:
    run(2, options())
    for ending in run_ranks(2, train, options(resume=True), {"hidden_size": 64}):
        assert "does not fit the model given" in ending


def test_parts_load_and_convert_as_the_exported_model(options, tmp_path, capsys) -> None:
    run(2, options(tensor_parallel=2))
    out = Path(options()["out"])
    checkpoint = list_checkpoints(out / "checkpoints")[-1][1]
    assert main(["convert", str(checkpoint), str(tmp_path / "converted")]) == 0
    assert "Hugging Face format" in capsys.readouterr().out
    first = make_model(torch.float32, **SHAPES["retention"]).state_dict()
    exported = oncelm.models.load(out / "model", device="cpu").state_dict()
    for folder in (checkpoint, tmp_path / "converted"):
        loaded = oncelm.models.load(folder, device="cpu").state_dict()
        assert loaded.keys() == exported.keys() == first.keys()
        for name, tensor in exported.items():
            assert torch.equal(loaded[name], tensor)
            assert not torch.equal(tensor, first[name])
