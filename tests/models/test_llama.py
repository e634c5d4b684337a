"""The Transformers beside the paper's YOCOs."""

from __future__ import annotations

import pytest
import torch

from oncelm.bench import llama_config
from oncelm.models import build_model
from oncelm.models.yoco.presets import LLAMA_PRESETS, PRESETS

# feed-forward widths of the twins: 8/3 d up to a multiple of 128, as LLaMA's own (4096: 11008, that of its 7B)
WIDTHS = {128: 384, 256: 768, 768: 2048, 1024: 2816, 1536: 4096, 2048: 5504, 2560: 6912, 3072: 8192, 4096: 11008,
          5120: 13696}  # fmt: skip


@pytest.mark.parametrize("yoco", PRESETS)
def test_every_yoco_has_one_twin_a_few_percent_smaller(yoco: str) -> None:
    llama = yoco.replace("yoco", "llama")
    with torch.device("meta"):
        trained, model = build_model(llama), build_model(yoco)
    assert 0.93 < trained.num_parameters() / model.num_parameters() < 1
    assert trained.config.intermediate_size == WIDTHS[trained.config.hidden_size]
    assert trained.config.to_dict() == llama_config(model.config).to_dict()  # what benchmarks measure


def test_presets_are_the_twins_of_all_yocos() -> None:
    assert list(LLAMA_PRESETS) == [name.replace("yoco", "llama") for name in PRESETS]


def test_weights_follow_the_seed() -> None:
    first, again, other = (build_model("llama-tiny", seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'llama-tiny'"):
        build_model("llama-tin")
    with pytest.raises(ValueError, match="unknown LlamaConfig key 'hidden_siz'; did you mean 'hidden_size'"):
        build_model("llama-tiny", hidden_siz=8)
