"""Our model with official weights is the official model, to 1e-4 in float32 (recorded outputs of the official code)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import oncelm

TOLERANCE = 1e-4
PROMPT = {"gret": 512, "swa": 300}

pytestmark = pytest.mark.parametrize("kind", PROMPT)


def load(golden: Path, kind: str):
    folder = golden / "yoco" / kind
    return oncelm.load(folder, device="cpu"), load_file(folder / "expected.safetensors")


def test_full_forward(golden: Path, kind: str) -> None:
    model, expected = load(golden, kind)
    ids, positions = expected["input_ids"][:, : PROMPT[kind]], expected["positions"]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, positions]
        chosen = model(ids, use_cache=False, logits_to_keep=positions).logits
    assert (logits - expected["logits"]).abs().max() < TOLERANCE
    assert (chosen - expected["logits"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("chunk_size", [37, 128, 1000])
def test_prefill_and_decode(golden: Path, kind: str, chunk_size: int) -> None:
    model, expected = load(golden, kind)
    ids, T = expected["input_ids"], PROMPT[kind]
    cache = model.new_cache(2, ids.shape[1])
    model.prefill(ids[:, : T - 1], cache, chunk_size=chunk_size)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(T - 1, ids.shape[1])]
    assert (torch.cat(steps, dim=1) - expected["decode_logits"]).abs().max() < TOLERANCE
