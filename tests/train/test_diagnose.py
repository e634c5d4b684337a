"""The first place that is not finite is named, forward and backward, on one rank and on two."""

from __future__ import annotations

import pytest
import torch

from oncelm.train.diagnose import find_not_finite
from oncelm.train.trainer import Trainer
from tests.models.small import make_model
from tests.train.parallel import cases
from tests.train.ranks import run_ranks


@pytest.fixture
def compute():
    tokens = cases.make_tokens(2, 12)

    def make(model):
        return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return make


MODELS = pytest.mark.parametrize("llama", [False, True], ids=["yoco", "llama"])


@MODELS
def test_a_finite_model_has_no_such_place_and_is_left_as_it_was(compute, llama: bool) -> None:
    model = cases.make_model(torch.float32, llama=llama)
    assert find_not_finite(model, compute(model)) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@MODELS
def test_a_weight(compute, llama: bool) -> None:
    model = cases.make_model(torch.float32, llama=llama)
    name, parameter = list(model.named_parameters())[5]
    parameter.data[0] = float("inf")
    assert find_not_finite(model, compute(model)).place == f"the weight {name}"


@MODELS
def test_the_module_that_overflows(compute, llama: bool) -> None:
    model = cases.make_model(torch.float32, llama=llama)
    names = [name for name, _ in model.named_modules() if name.endswith(("down_proj", "fc2"))]
    module = model.get_submodule(names[1])
    module.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    assert find_not_finite(model, compute(model)).place == f"the output of {names[1]}"


def test_where_decoders_are_not_called_as_a_whole() -> None:
    model, ids = make_model("interleaved"), torch.arange(8)[None]
    model.self_decoder.layers[1].ffn.fc2.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    found = find_not_finite(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    assert found.place == "the output of self_decoder.layers.1.ffn.fc2"


@MODELS
def test_a_gradient(compute, llama: bool) -> None:
    model = cases.make_model(torch.float32, llama=llama)
    names = [name for name, _ in model.named_modules() if name.endswith(("down_proj", "fc2"))]

    def poison(module, inputs, output):
        output.register_hook(lambda gradient: gradient * float("nan"))
        return output.clone()

    model.get_submodule(names[0]).register_forward_hook(poison)
    found = find_not_finite(model, compute(model))
    assert found.place.startswith("the gradient of the output of")


def test_a_run_names_the_layer_and_the_sequences(make_model, dataset, make_config) -> None:
    model = make_model()

    def overflow(module, inputs, output):
        return output * float("inf") if trainer.step == 3 else output

    model.model.layers[0].self_attn.o_proj.register_forward_hook(overflow)
    trainer = Trainer(model, dataset, make_config(grad_accumulation=2, eval_every=None))
    pattern = (
        r"^loss is nan at step 4; the first place is the output of model\.layers\.0\.self_attn\.o_proj, in sequences "
        r"0 \(tokens .* of source 'text'\), 1 \(tokens .*\) of the step; the last checkpoint is .*step-000002"
    )
    with pytest.raises(FloatingPointError, match=pattern):
        trainer.train()


@pytest.mark.parametrize(
    ("event", "place"),
    [(cases.overflow, "the output of self_decoder.layers.0.ffn"), (cases.spoil_weight, "the weight self_decoder")],
    ids=["output", "weight"],
)
def test_ranks_tell_each_other(tmp_path, event, place: str) -> None:
    options = {
        **{"data": "unused", "out": str(tmp_path), "seq_len": 16, "batch_size": 4, "steps": 6},
        **{"warmup_steps": 2, "log_every": 1, "save_every": 2, "eval_every": None},
    }
    for ending in run_ranks(2, cases.train, options, {}, 1, 3, event, fresh=True):
        assert "FloatingPointError" in ending
        assert f"the first place is {place}" in ending
        assert "in sequences 2 " in ending  # rank 1 has the second half
        assert "step-000002" in ending
