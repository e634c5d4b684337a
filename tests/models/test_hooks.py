"""Forward hooks fire on every module that has weights, whichever way the model is run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.small import KINDS, VOCAB, make_long, make_model


def watched(model: nn.Module, skipped: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """Names of the modules with weights, and of those whose hooks have fired so far."""
    names, fired = set(), set()
    for name, module in model.named_modules():
        if name in ("", *skipped) or isinstance(module, nn.ModuleList) or not any(True for _ in module.parameters()):
            continue
        names.add(name)
        module.register_forward_hook(lambda module, given, output, name=name: fired.add(name))
    return names, fired


@pytest.mark.parametrize("kind", [*KINDS, "long"])
@torch.no_grad()
def test_every_module_with_weights_is_called(kind: str) -> None:
    model = make_long() if kind == "long" else make_model(kind)
    ids = torch.randint(2, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    # where layers alternate neither half is called as a whole: hooks there are refused by name
    halves = ("self_decoder", "cross_decoder") if "interleaved" in kind else ()
    names, fired = watched(model.compile_layers(), halves)

    def fires(run) -> None:
        fired.clear()
        run()
        assert names - fired <= ({"self_decoder"} if kind == "cross-only" else set())

    cache = model.new_cache(2, 48)
    fires(lambda: model(ids, use_cache=False))
    fires(lambda: model.prefill(ids, cache))
    fires(lambda: model(ids[:, :1], past_key_values=cache))
    if kind != "long":
        fires(lambda: model.step(ids[:, 1:2], cache))
    for half in halves:
        hook = model.get_submodule(half).register_forward_hook(lambda module, given, output: None)
        with pytest.raises(ValueError, match=f"register them on {half}.layers"):
            model(ids)
        hook.remove()
