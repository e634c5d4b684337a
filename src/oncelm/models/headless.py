"""A model without its head, for tools that bring a loss of their own (TRL, contrastive training)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class Headless(nn.Module):
    """What `model.base_model` is: called as a base model is, it gives hidden states.

    Its modules are the model's own without the head, so that freezing it, say, freezes them.

    Args:
        hidden_states: the model's way to them.
    """

    _tp_plan = _pp_plan = None  # transformers asks its base models for plans of parallel layers

    def __init__(self, hidden_states: Callable[..., Any]) -> None:
        super().__init__()
        self._hidden_states = hidden_states

    def look_at(self, model: nn.Module, head_names: Sequence[str]) -> None:
        """Take the model's modules as they are now: tools exchange them."""
        self._modules = {name: module for name, module in model.named_children() if name not in head_names}
        self.training = model.training

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """As BaseModel.forward."""
        return self._hidden_states(input_ids, attention_mask, **kwargs)
