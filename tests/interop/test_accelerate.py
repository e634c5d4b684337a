"""accelerate's device maps: weights in CPU memory or in files, fetched when a module is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.interop.families import draw_ids, families, make

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}


def on_disk(family: str, folder: Path) -> Any:
    make(family).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "offloaded")


def in_parts(family: str, folder: Path) -> Any:
    """The head on the disk, the rest where it computes."""
    make(family).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = "lm_head" if hasattr(model, "lm_head") else "output_projection"
    parts = {name: "cpu" for name, _ in model.named_children() if name != head}
    return accelerate.dispatch_model(
        model, {**parts, head: "disk"}, main_device="cpu", offload_dir=folder / "offloaded", force_hooks=True
    )


def by_cpu_offload(family: str, folder: Path) -> Any:
    return accelerate.cpu_offload(make(family), execution_device="cpu")


def automatic(family: str, folder: Path) -> Any:
    make(family).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, device_map="auto")


@families
@pytest.mark.parametrize("place", [on_disk, in_parts, by_cpu_offload, automatic])
@torch.no_grad()
def test_weights_elsewhere_change_nothing(family: str, place: Any, tmp_path: Path) -> None:
    model, plain, ids = place(family, tmp_path), make(family), draw_ids(2, 48)
    if place is not automatic:
        assert any(p.is_meta for p in model.parameters())
    logits = plain(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, logits)
    torch.testing.assert_close(model(ids, use_cache=True).logits, plain(ids, use_cache=True).logits)
    torch.testing.assert_close(model(ids, labels=ids).loss, F.cross_entropy(logits[:, :-1].mT, ids[:, 1:]))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for options in ({}, {"num_beams": 2}):
        options = {**options, "attention_mask": mask, **GREEDY}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    if family != "llama":
        caches = [made.new_cache(2) for made in (model, plain)]
        for made, cache in zip((model, plain), caches, strict=True):
            made.prefill(ids[:, :40], cache)
        torch.testing.assert_close(
            model(ids[:, 40:], past_key_values=caches[0]).logits, plain(ids[:, 40:], past_key_values=caches[1]).logits
        )


@families
def test_a_layer_stays_on_one_device(family: str) -> None:
    """device_map="auto" cuts between layers, never within one, where hidden states of two devices would meet."""
    model = make(family)
    layers = {type(m).__name__ for name, m in model.named_modules() if name.endswith("layers.0")}
    assert layers <= set(model._no_split_modules)
    size = accelerate.utils.compute_module_sizes(model)[""]
    found = accelerate.infer_auto_device_map(
        model, {0: 4 * size // 5, "cpu": 10 * size}, no_split_module_classes=model._no_split_modules
    )
    assert set(found.values()) == {0, "cpu"}
    inside = [name for name in found if ".layers." in name and not name.split(".layers.")[1].isdigit()]
    assert inside == []
