"""The Transformers beside the paper's YOCOs."""

from __future__ import annotations

import pytest
import torch

from oncelm.models.llama import LLAMA_PRESETS, build_llama
from oncelm.models.load import build_model
from oncelm.models.yoco.presets import PRESETS


def test_every_yoco_has_one_of_about_its_size() -> None:
    assert len(LLAMA_PRESETS) == len(PRESETS)
    for yoco, llama in zip(PRESETS, LLAMA_PRESETS, strict=True):
        with torch.device("meta"):
            sizes = [build(name).num_parameters() for build, name in ((build_model, yoco), (build_llama, llama))]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


def test_weights_follow_the_seed() -> None:
    first, again, other = (build_llama("llama-tiny", seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'llama-tiny'"):
        build_llama("llama-tin")
    with pytest.raises(ValueError, match="unknown LlamaConfig key 'hidden_siz'; did you mean 'hidden_size'"):
        build_llama("llama-tiny", hidden_siz=8)
