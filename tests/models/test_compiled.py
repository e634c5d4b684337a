"""Compiled layers compute what plain ones do, and are compiled once for all layers and all places in a text."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from tests.models.small import VOCAB, make_model

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def losses_and_gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["retention", "window"])
def test_prefill_compiles_once_whatever_the_depth_and_the_chunks(kind: str) -> None:
    ids = draw_ids(1, 300)
    counts = []
    for layers in (1, 3):
        torch._dynamo.reset()
        counters.clear()
        model = make_model(kind, num_self_decoder_layers=layers)
        expected = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        model.compile_layers()
        with torch.no_grad():
            for chunk_size in (100, 77):  # the last chunk of 77 is shorter: 69
                got = model.prefill(ids, model.new_cache(1, 300), chunk_size=chunk_size)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        counts.append(graphs())
    assert counts[0] == counts[1] == 3  # before, after, keys_and_values


@pytest.mark.parametrize("kind", ["retention", "window"])
def test_training_gives_the_same_gradients(kind: str) -> None:
    ids = draw_ids(2, 40)
    counts = []
    for layers in (1, 2):
        model = make_model(kind, num_self_decoder_layers=layers, num_cross_decoder_layers=layers).train()
        loss, gradients = losses_and_gradients(model, ids)
        model.compile_layers()
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            got_loss, got = losses_and_gradients(model, ids)
            torch.testing.assert_close(got_loss, loss, rtol=1e-4, atol=1e-5)
            for name, gradient in gradients.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
        counts.append(graphs())
    assert counts[0] == counts[1] == 5  # before and after of each half, keys_and_values
