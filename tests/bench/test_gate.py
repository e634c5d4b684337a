"""A target that computes the wrong thing is refused."""

from __future__ import annotations

import pytest
import torch

from oncelm.bench import GateError, check, run
from oncelm.cache import RecurrentState, SharedKV
from oncelm.cache.longllama.memory_kv import MemoryKV
from tests.bench.conftest import tiny_llama, tiny_long, tiny_yoco


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_yoco, tiny_llama, tiny_long])
def test_sound_targets_pass(make, dtype):
    target = make()
    target.model.to(dtype)
    assert set(check(target, dtype)) == {"prefill", "decode", "loss"}


def test_a_cache_that_loses_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(SharedKV, "append", lambda self, k, v, batch: None)
    with pytest.raises(GateError, match="YOCO's prefill differs from plain PyTorch's"):
        check(tiny_yoco(), torch.float32)


def test_a_memory_that_is_not_seen_is_refused(monkeypatch):
    attend = MemoryKV.attend

    def forgetful(self, q, k, raw_k, v, window):
        self.k.zero_()
        return attend(self, q, k, raw_k, v, window)

    monkeypatch.setattr(MemoryKV, "attend", forgetful)
    with pytest.raises(GateError, match="LongLLaMA's prefill differs"):
        check(tiny_long(), torch.float32)


def test_a_state_that_is_not_carried_over_is_refused_even_in_bfloat16(monkeypatch):
    scan = RecurrentState.scan
    monkeypatch.setattr(
        RecurrentState, "scan", lambda self, *args, **step: (self.state.zero_(), scan(self, *args, **step))[1]
    )
    yoco = tiny_yoco(num_cross_decoder_layers=0)
    yoco.model.bfloat16()
    with pytest.raises(GateError):
        check(yoco, torch.bfloat16)


def test_nan_is_refused():
    yoco = tiny_yoco()
    torch.nn.init.constant_(yoco.model.layer_norm.weight, float("nan"))
    with pytest.raises(GateError, match="nan"):
        check(yoco, torch.float32)


def test_nothing_is_reported_behind_a_red_gate(monkeypatch):
    monkeypatch.setattr(SharedKV, "append", lambda self, k, v, batch: None)
    reported: list[dict] = []
    with pytest.raises(GateError):
        run("prefill", [tiny_yoco()], [16], dtype=torch.float32, on_record=reported.append)
    assert not reported
