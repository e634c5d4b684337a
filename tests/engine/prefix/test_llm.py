"""The prefix cache in the engine: whatever is restored from wherever, the answers are those of a request alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from oncelm.engine.llm import LLM
from oncelm.engine.params import SamplingParams
from tests.models.small import VOCAB, make_model

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
MUCH = 1 << 22


def text(length: int, seed: int = 0) -> list[int]:
    return [(i * 31 + i * i * 7 + seed * 17) % VOCAB for i in range(length)]


def start(kind: str, **options: Any) -> LLM:
    options = {
        "max_model_len": 96,
        "max_num_seqs": 2,
        "page_size": 8,
        "kv_cache_bytes": MUCH,
        "verbose": False,
    } | options
    return LLM(make_model(kind), None, snapshot_interval=16, **options)


def ask(llm: LLM, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The answers, one prompt after the other, and how much of each was known."""
    outputs = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
    return [output.outputs[0].token_ids for output in outputs], [output.num_cached_tokens for output in outputs]


@pytest.mark.parametrize("kind", ["retention", "hybrid"])
def test_answers_are_the_same_from_every_place_and_after_a_restart(kind, tmp_path: Path) -> None:
    prompts = [text(40), text(41), [*text(33), 5, 6, 7], [*text(16), 1], text(50, 1), text(60)]
    expected, _ = ask(start(kind, enable_prefix_caching=False), prompts)
    with start(kind, cpu_cache_bytes=MUCH, cache_dir=str(tmp_path), num_snapshots=2) as llm:
        for _ in range(2):
            answers, known = ask(llm, prompts)
            assert answers == expected
        assert known == [39, 40, 35, 16, 49, 59]
        assert llm.metrics().gauges.snapshots["cpu"] > 2  # the device has room for two
        assert llm.metrics().prefix_cache.hits > len(prompts)
    with start(kind, page_size=16, cache_dir=str(tmp_path)) as llm:
        assert ask(llm, prompts) == (expected, known)


def test_behind_a_damaged_snapshot_the_one_before_is_used(tmp_path: Path) -> None:
    with start("retention", cache_dir=str(tmp_path)) as llm:
        (expected,), _ = ask(llm, [text(40)])
        last = llm.engine.cache.match(text(40)).snapshot
        assert last.n == 39
        file = llm.engine.cache._below._folder.place(last.key)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with start("retention", cache_dir=str(tmp_path)) as llm:
        assert ask(llm, [text(40)]) == ([expected], [32])
        assert ask(llm, [text(40)]) == ([expected], [39])
        assert llm.metrics().prefix_cache.damaged == 1


def test_what_a_slightly_other_model_has_kept_is_not_used(tmp_path: Path) -> None:
    model = make_model("retention", vocab_size=3000)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[text(40)[20]] += 1e-3  # a row that a sample of the weights may miss
    assert tuned.fingerprint() == model.fingerprint()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    found = []
    for one in (model, tuned, rounded, copy.deepcopy(rounded).float(), model):
        with LLM(one, kv_cache_bytes=MUCH, kv_cache_dtype="int8", cache_dir=str(tmp_path), verbose=False) as llm:
            found += ask(llm, [text(40)])[1]
    assert found == [0, 0, 0, 0, 39]
