"""What a run would take, against what one takes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import oncelm
from oncelm.bench import llama_config
from oncelm.models import describe
from oncelm.models.longllama import LongLlamaConfig
from oncelm.models.yoco import YocoConfig, YocoForCausalLM
from oncelm.train.config import TrainConfig
from oncelm.train.optimizer import build_optimizers
from oncelm.train.plan import activation_bytes, check_machine, describe_plan, estimate_memory

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 128, "intermediate_size": 384},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
HALVES = {"num_self_decoder_layers": 2, "num_cross_decoder_layers": 2}
WINDOW = {"num_self_heads": 4, "self_decoder": "sliding_window", "window_size": 64}


def make(name: str):
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=4))
    kinds = {"window": WINDOW, "delta": {"self_decoder": "gated_delta", "num_self_heads": 2}}
    return YocoForCausalLM(YocoConfig(**SHAPE, **HALVES, **kinds.get(name, {"num_self_heads": 2})))


def kept_bytes(model, dtype: str) -> int:
    """What autograd keeps of one forward pass over 2 x 256 tokens, but for the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(2, 256, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model.train()(input_ids=ids, labels=ids, use_cache=False)
    casts = sum(p.numel() for p in model.parameters() if p.ndim == 2) * 2 if dtype == "bfloat16" else 0
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - casts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["retention", "window", "llama"])
def test_activations_are_about_what_autograd_keeps(name: str, dtype: str) -> None:
    model = make(name)
    estimate = activation_bytes(model.config, 512, dtype, 1, checkpointing=False, compiled=False)
    # the plain form of retention keeps matrices of each of its chunks, too
    assert estimate == pytest.approx(kept_bytes(model, dtype), rel=0.4 if name == "retention" else 0.25)
    checkpointed = activation_bytes(model.config, 512, dtype, 1, checkpointing=True, compiled=False)
    assert checkpointed < 0.6 * estimate


SMOLLM2 = {
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    ("model", "rows", "seq_len", "checkpointing", "measured"),
    [
        # bytes that PyTorch allocated on an H200 (benchmarks/results/h200-longest-sequence.jsonl, h200-longllama.jsonl)
        ("yoco", 1, 131072, False, 50.5e9),
        ("yoco", 1, 524288, True, 40.6e9),
        ("llama", 1, 32768, False, 35.3e9),
        ("llama", 1, 32768, True, 25.4e9),
        ("smollm2", 64, 2048, False, 76.4e9),
        ("smollm2", 16, 2048, False, 21.5e9),
    ],
)
def test_estimates_are_near_what_compiled_runs_took(make_config, model, rows, seq_len, checkpointing, measured) -> None:
    yoco = describe("yoco-160m")
    config = {"yoco": yoco, "llama": llama_config(yoco), "smollm2": LongLlamaConfig(**SMOLLM2)}[model]
    options = {"dtype": "bfloat16", "compile": True, "activation_checkpointing": checkpointing}
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    memory = estimate_memory(made, make_config(batch_size=rows, seq_len=seq_len, **options), 1)
    assert memory.total == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_what_there_will_be(make_config, optimizer: str) -> None:
    model, config = make("retention"), make_config(optimizer=optimizer)
    memory = estimate_memory(model, config, 1)
    optimizers = build_optimizers(model, config)
    model(input_ids=torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss.backward()
    for part in optimizers:
        part.step()
    states = (value for part in optimizers for state in part.state.values() for value in state.values())
    assert memory.optimizer == sum(value.nbytes for value in states if value.ndim)
    assert memory.weights == memory.gradients == sum(p.nbytes for p in model.parameters())
    assert memory.gathered == 0


def test_processes_share(make_config) -> None:
    with torch.device("meta"):
        model = make("window")
    one, two = (estimate_memory(model, make_config(batch_size=4), processes) for processes in (1, 2))
    assert two.weights == one.weights // 2
    assert two.optimizer == one.optimizer // 2
    assert two.activations == one.activations // 2
    assert two.gathered > 0
    accumulated = estimate_memory(model, make_config(batch_size=2, grad_accumulation=4), 2)
    assert accumulated.gradients == 3 * one.gradients // 2  # its part, and the whole model's until they are summed
    with pytest.raises(ValueError, match="must divide the number of processes, 3"):
        estimate_memory(model, make_config(context_parallel=2), 3)
    with pytest.raises(ValueError, match="do not divide among 3 processes"):
        estimate_memory(model, make_config(batch_size=4), 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"context_parallel": 2}, "context_parallel is for YOCO models"),
        ("llama", {"tensor_parallel": 2}, "tensor_parallel is for YOCO models"),
        ("window", {"tensor_parallel": 8}, "num_self_heads 4 does not divide"),
        ("delta", {"context_parallel": 2}, "GatedDelta does not know how to mix a sequence that is split over ranks"),
    ],
)
def test_what_cannot_be_split_is_said_before_anything_is_done(make_config, name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_memory(make(name), make_config(**options), 8)


def test_a_plan_in_words(make_config) -> None:
    with torch.device("meta"):
        model = make("retention")
    shown = describe_plan(make_config(steps=None, max_seconds=60.0), model, "a book", 2)
    without = model.num_parameters() - 2 * 128 * 128
    assert f"parameters       {model.num_parameters():,} ({without:,} without embeddings)" in shown
    assert "steps            as many as fit, at most 60 s" in shown
    assert "processes        2" in shown


def test_a_run_beyond_the_machine_is_refused(monkeypatch) -> None:
    model = oncelm.build_model("yoco-tiny", vocab_size=300)
    config = TrainConfig(data="x", out="x", batch_size=64)
    needed = estimate_memory(model, config, 1).total
    for memory, refused in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr("oncelm.utils.memory.machine_memory", lambda memory=memory: memory)
        with pytest.raises(ValueError, match="batch_size 64 with seq_len 512 would take") if refused else nullcontext():
            check_machine(model, config, 1, torch.device("cpu"))
        check_machine(model, config, 1, torch.device("cuda"))  # which says so by itself
