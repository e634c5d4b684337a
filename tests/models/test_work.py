"""The derived FLOPs are those that torch counts while the models run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from oncelm.bench import Ceilings
from oncelm.bench.peer import llama_config
from oncelm.models import describe, work
from oncelm.models.longllama import work as long_work
from oncelm.models.work import Work
from oncelm.models.yoco import work as yoco_work
from oncelm.models.yoco.mixers import full_attention, sliding_window
from oncelm.models.yoco.presets import sized_config
from tests.bench.conftest import tiny_llama, tiny_yoco
from tests.models.small import make_long

B, T = 2, 256
SHAPES = [
    {},
    {"self_decoder": "sliding_window", "window_size": 30, "num_self_heads": 4, "num_self_key_value_heads": 1},
    {"self_decoder": "gated_delta", "num_self_heads": 4},
    {"self_decoder": "full_attention", "num_self_heads": 4, "num_self_key_value_heads": 2},
    {"layer_types": ["sliding_window", "full_attention", "cross_attention"], "window_size": 30, "num_self_heads": 4},
    {"layout": "interleaved"},
    {"layout": "unstacked", "tie_word_embeddings": True},
    {"num_cross_decoder_layers": 0},
    {"num_self_decoder_layers": 0},
]


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of weight matrices (mm, the loss) and of token mixing (bmm: the math kernel of SDPA, and retention)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    counts = Counter({str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()})
    assert set(counts) <= {"mm", "bmm", "oncelm.linear_cross_entropy"}
    return counts["mm"] + counts["oncelm.linear_cross_entropy"], counts["bmm"]


@pytest.fixture
def every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """The math kernel computes the masked pairs too; count as it does."""
    for module in (work, yoco_work, long_work, sliding_window, full_attention):
        monkeypatch.setattr(module, "causal_pairs", lambda T, window=None: T * T)


@pytest.mark.parametrize("shape", SHAPES)
def test_yoco_prefill_and_training(shape, every_pair):
    yoco = tiny_yoco(**shape)
    config = yoco.model.config
    ids = torch.zeros(B, T, dtype=torch.long)
    with torch.no_grad():
        prefill = counted(lambda: yoco.prefill(ids)), yoco.work.prefill(B, T)
    train = counted(lambda: yoco.model.train()(ids, labels=ids).loss.backward()), yoco.work.train(B, T)
    for (linear, mixing), expected in (prefill, train):
        assert linear == expected.linear
        if {"gated_retention", "gated_delta"} & {*config.self_layer_types}:
            assert mixing > expected.mixing  # the chunkwise form does more than the recurrent one, which is counted
        else:
            assert mixing == expected.mixing


def test_llama_prefill_decode_and_training(every_pair):
    llama = tiny_llama()
    ids = torch.zeros(B, T, dtype=torch.long)

    with torch.no_grad():
        session = llama.prefill(ids)[1]
        assert session.nbytes() == B * T * llama.model.config.num_hidden_layers * llama.work.cached * 4
        for run, expected in (
            (lambda: llama.prefill(ids), llama.work.prefill(B, T)),
            (lambda: session.step(ids[:, :1]), llama.work.decode(B, T)),
        ):
            assert counted(run) == (expected.linear, expected.mixing)
    expected = llama.work.train(B, T)
    assert counted(lambda: llama.model(ids, labels=ids).loss.backward()) == (expected.linear, expected.mixing)


def test_yoco_decode():
    yoco = tiny_yoco(self_decoder="sliding_window", window_size=30, num_self_heads=4)
    with torch.no_grad():
        session = yoco.context(B, T, room=1)
        linear, mixing = counted(lambda: session.step(torch.zeros(B, 1, dtype=torch.long)))
    expected = yoco.work.decode(B, T)
    assert (linear, mixing) == (expected.linear, expected.mixing)


def test_longllama_reads_windows_and_memory():
    """With windows of one token, no kernel computes a masked pair."""
    config = {"max_position_embeddings": 1, "last_context_length": 1, "mem_layers": [1, 2], "num_hidden_layers": 5}
    model, tokens = make_long(**config), 24
    costs, ids = long_work.LongLlamaWork(model.config, 4), torch.ones(B, tokens, dtype=torch.long)
    with torch.no_grad():
        cache = model.new_cache(B, max_tokens=tokens + 1)
        for run, expected in (
            (lambda: model.prefill(ids, cache), costs.prefill(B, tokens)),
            (lambda: model(ids[:, :1], past_key_values=cache), costs.decode(B, tokens)),
        ):
            assert counted(run) == (expected.linear, expected.mixing)


def test_longllama_trains_with_crossbatch(every_pair):
    rows, length, layers = 8, 16, 3
    shape = {"max_position_embeddings": length, "mem_layers": [1], "num_hidden_layers": layers}
    model = make_long(cross_batch_range=3, cross_batch_stepping=True, dataset_packing=4, **shape).train()
    expected = long_work.LongLlamaWork(model.config, 4).train(rows, length)
    ids = torch.ones(rows, length, dtype=torch.long)
    linear, mixing = counted(lambda: model(ids, labels=ids).loss.backward())
    pairs = length**2 * (layers * rows + sum((0, 1, 2, 3, 0, 2, 3, 3)))
    assert expected.mixing == 3 * 4 * 32 * pairs
    recomputed = length**2 * (rows + sum((0, 1, 2, 3, 0, 2, 3, 3)))  # scores of the memory layer, once more backward
    assert mixing == expected.mixing + 2 * 32 * recomputed
    assert linear == pytest.approx(expected.linear, rel=0.01)  # a row's last token has no target


@pytest.mark.parametrize("make", [make_long, lambda: tiny_yoco().model])
def test_a_cache_of_fewer_bits_moves_fewer_bytes(make):
    model = make()
    whole, narrow = (model.work(model.config, 4, kv_element_size).decode(B, T) for kv_element_size in (None, 1.25))
    assert narrow.bytes < whole.bytes
    assert narrow.flops == whole.flops


def test_causal_pairs():
    assert work.causal_pairs(5) == 15
    assert work.causal_pairs(5, window=2) == 1 + 2 * 4
    assert work.causal_pairs(5, window=9) == 15


def test_the_floor_is_the_slower_of_computing_and_moving():
    ceilings = Ceilings(flops_per_second=10.0, bytes_per_second=2.0)
    assert ceilings.floor_seconds(Work(linear=50, mixing=50, bytes=4)) == 10
    assert ceilings.floor_seconds(Work(linear=5, mixing=5, bytes=4)) == 2


@pytest.mark.parametrize(
    "config", [sized_config(), *(describe(name) for name in ("yoco-160m", "yoco-1.4b", "yoco-3b", "yoco-13b"))]
)
def test_the_peer_is_of_the_same_size_or_a_little_smaller(config):
    yoco, llama = yoco_work.YocoWork(config, 4), work.LlamaWork(llama_config(config), 4)
    assert 0.92 < llama.weights / yoco.weights < 1
