"""Ids, labels and borders on the CPU: the same results, and no waiting for the device that the model is on.

See `tests/stand_ins.py` for how a CPU can tell.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oncelm.models.inputs import NOTHING
from tests.models.small import VOCAB, make_long, make_model
from tests.stand_ins import install


@pytest.fixture
def kernels(monkeypatch) -> None:
    install(monkeypatch)


def inputs(way: str) -> dict[str, Any]:
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if "some" in way:
        labels[:, :5] = -100
        labels[1, 8] = -100
    if "packed" in way:
        cu_seqlens = torch.tensor([0, 3, 3, 12, 24], dtype=torch.int32)
        return {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1), "cu_seqlens": cu_seqlens}
    return {"input_ids": ids, "labels": labels}


WAYS = pytest.mark.parametrize("way", ["dense", "dense, some", "packed", "packed, some"])
MODELS = pytest.mark.parametrize("kind", ["retention", "window", "long"])


def loss(model, given: dict[str, Any]) -> torch.Tensor:
    return model(**given, logits_to_keep=NOTHING, num_items_in_batch=7, use_cache=False).loss


@WAYS
@MODELS
def test_no_value_of_a_device_is_read(kernels, kind: str, way: str) -> None:
    model = (make_long() if kind == "long" else make_model(kind)).train().to("meta")
    loss(model, inputs(way)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.gpu
@WAYS
@MODELS
def test_a_gpu_is_not_waited_for(kind: str, way: str) -> None:
    model = (make_long() if kind == "long" else make_model(kind)).train().cuda()
    given = {name: tensor.pin_memory() for name, tensor in inputs(way).items()}
    on_gpu = {name: tensor.cuda() for name, tensor in given.items()}
    with torch.autocast("cuda", torch.bfloat16):
        expected = loss(model, on_gpu)  # compiles kernels, and fills the allocator
        expected.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = loss(model, given)
            found.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected)
