"""Models that are too large for their files or for this machine are refused before any memory is taken."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import oncelm
from oncelm.cli import main
from oncelm.models import build_model
from oncelm.models.checks import check_tokens
from oncelm.models.load import quiet_transformers
from oncelm.models.size import count_parameters
from tests.models.small import make_long, make_model

FAMILIES = {
    "yoco": lambda: make_model("retention"),
    "window": lambda: make_model("window"),
    "longllama": make_long,
    "other": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
}


@pytest.fixture(autouse=True)
def _takes_little_memory():
    """Nothing in this file may take a GiB."""
    before = psutil.Process().memory_info().rss
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28
    assert psutil.Process().memory_info().rss - before < 2**30


@pytest.fixture
def folder(request, tmp_path) -> Path:
    with quiet_transformers():
        FAMILIES[request.param]().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        *((family, {key: value}) for family in ("yoco", "window", "longllama") for key, value in (
            ("vocab_size", 10**13), ("vocab_size", 10**9), ("vocab_size", 10**7), ("hidden_size", 10**9),
            ("hidden_size", 2**20), ("intermediate_size", 2**23), ("intermediate_size", 10**12),
        )),
        ("longllama", {"num_hidden_layers": 10**6}),
        ("yoco", {"num_self_decoder_layers": 10**6}),
        ("longllama", {"head_dim": 60_000}),
        *(("other", {key: value}) for key, value in (
            ("vocab_size", 10**13), ("vocab_size", 10**8), ("n_embd", 10**9), ("n_layer", 10**6),
            ("n_positions", 10**9),
        )),
    ],
    indirect=["folder"],
)  # fmt: skip
def test_a_configuration_beyond_its_weights_is_refused(folder, changes) -> None:
    edit(folder, **changes)
    with pytest.raises(
        ValueError, match=r"must be at most|of another model|no model can have|config.json asks for \["
    ) as error:
        oncelm.load(folder, "cpu")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["yoco", "longllama", "other"], indirect=True)
def test_the_weights_of_a_sound_folder_are_enough(folder) -> None:
    stored = (folder / "model.safetensors").stat().st_size
    assert 4 * count_parameters(oncelm.load(folder, "cpu").config) <= stored


@pytest.mark.parametrize("limit", [10**5, 10**6])
def test_a_new_model_is_compared_with_the_machine(limit, monkeypatch) -> None:
    monkeypatch.setattr("oncelm.utils.memory.machine_memory", lambda: limit)
    for build in (
        lambda: oncelm.build_model("yoco-tiny", vocab_size=300),
        lambda: build_model("llama-tiny", vocab_size=300),
        lambda: build_model("llama-tiny", vocab_size=300, mem_layers=[1]),
    ):
        with pytest.raises(ValueError, match=r"a model of [\d,]+ parameters would take .*; this machine has"):
            build()
    with torch.device("meta"):
        assert oncelm.build_model("yoco-tiny", vocab_size=300).device.type == "meta"


@pytest.mark.parametrize("family", ["yoco", "window", "longllama"])
def test_a_cache_is_compared_with_the_machine(family) -> None:
    model = FAMILIES[family]()
    for rows, tokens in ((1, 10**15), (10**15, 1), (10**4, 10**10)):
        with pytest.raises(ValueError, match=r"would take .*; this machine has"):
            model.new_cache(rows, tokens)
    if family == "window":
        model.config.window_size = 10**15
        with pytest.raises(ValueError, match="a window of 1,000,000,000,000,000 tokens would take"):
            model.new_cache(1, 8)


@pytest.mark.parametrize("folder", ["yoco", "longllama"], indirect=True)
def test_the_command_line_says_it_in_one_line(folder, capsys) -> None:
    for changes in ({"vocab_size": 10**9}, {"hidden_size": 10**9}):
        before = json.loads((folder / "config.json").read_text())
        edit(folder, **changes)
        for arguments in (
            ["generate", "--model", str(folder), "--prompt", "a", "--tokenizer", "bytes", "--device", "cpu"],
            ["eval", "nll", str(folder), "--tokenizer", "bytes", "--device", "cpu"],
            ["bench", "prefill", "--model", str(folder), "--device", "cpu"],
        ):
            assert main(arguments) == 2
            shown = capsys.readouterr().err
            assert shown.startswith("oncelm: error: ")
            assert shown.count("\n") == 1
        edit(folder, **before)


def test_a_tensor_without_values_is_not_looked_at() -> None:
    ids = torch.zeros(1, 9, dtype=torch.long, device="meta")
    assert check_tokens(ids, None, make_model("retention").config).device.type == "meta"
