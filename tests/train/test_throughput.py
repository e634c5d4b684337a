"""Speed, waiting, memory and use of the hardware, as a run reports them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from oncelm.models.work import LlamaWork
from oncelm.models.yoco import YocoConfig
from oncelm.train.parallel.mesh import Mesh, MeshDim
from oncelm.train.throughput import ThroughputMeter, peak_tflops
from oncelm.train.trainer import Trainer

CPU = Mesh(torch.device("cpu"))


def test_a_run_logs_them(make_model, dataset, make_config) -> None:
    config = make_config(peak_tflops=1e-3)
    Trainer(make_model(), dataset, config).train()
    lines = map(json.loads, (Path(config.out) / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == 6
    for line in logged:
        assert line["tokens_per_second"] > 0
        assert 0 <= line["data_wait"] < 1
        assert 0.01 < line["memory_gib"] < 100
        assert line["mfu"] == pytest.approx(line["tflops"] / 1e-3)


def test_shares_and_rates(make_config, make_model) -> None:
    config = make_config(seq_len=16, batch_size=2, grad_accumulation=3, peak_tflops=2.0)
    model = make_model()
    two = Mesh(torch.device("cpu"), world=MeshDim(0, 2))
    meter = ThroughputMeter(model.config, config, two)
    for _ in range(2):
        with meter.step():
            with meter.waiting():
                time.sleep(0.03)
            time.sleep(0.03)
    values = meter.take()
    assert 0.4 < values["data_wait"] < 0.65
    seconds = 2 * 96 / values["tokens_per_second"]
    assert 0.12 <= seconds < 0.5
    flops = LlamaWork(model.config, 4).train(6, 16).flops
    assert values["tflops"] * 1e12 == pytest.approx(2 * flops / seconds / 2)
    assert values["mfu"] == values["tflops"] / 2


@pytest.mark.parametrize("model_config", [YocoConfig(), LlamaConfig()], ids=lambda config: config.model_type)
def test_flops_are_left_out_where_they_are_not_known(make_config, model_config) -> None:
    def keys(**options) -> set[str]:
        meter = ThroughputMeter(model_config, make_config(**options), CPU)
        with meter.step():
            pass
        return set(meter.take())

    always = {"tokens_per_second", "data_wait", "memory_gib"}
    assert keys() == always | {"tflops"}  # the peak of a CPU is not
    assert keys(document_masking=True) == always


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("Other", None)],
)
def test_peaks_of_gpus(monkeypatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), "bfloat16") == peak
    assert peak_tflops(torch.device("cuda"), "float32") is None
