"""Further arguments of `forward`: a family's own, and those that Hugging Face tools pass under other names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

# What Hugging Face tools hand to every model, and what says nothing that these models do not know already.
_NOT_OURS = frozenset({
    "assistant_model", "assistant_tokenizer", "cache_position", "is_first_iteration", "max_length_k", "max_length_q",
    "token_type_ids", "tokenizer",
})  # fmt: skip
RENAMED = {"memory": "past"}  # of a YOCO: memory is LongLLaMA's

Method = TypeVar("Method", bound=Callable[..., Any])


def with_arguments_of(general: Callable[..., Any]) -> Callable[[Method], Method]:
    """A decorator for a method that passes all but its own keyword arguments on to `general`: its signature names both,
    for Trainer, generate and PEFT, which look there for what a model takes."""

    def decorate(method: Method) -> Method:
        own = [x for x in inspect.signature(method).parameters.values() if x.kind == x.KEYWORD_ONLY]
        *shared, others = inspect.signature(general).parameters.values()
        method.__signature__ = inspect.Signature([*shared, *own, others])  # type: ignore[attr-defined]
        return method

    return decorate


def read_extras(
    model: PreTrainedModel,
    kwargs: dict[str, Any],
    cu_seqlens: torch.Tensor | None,
    targets: torch.Tensor | None,
    **outputs: bool | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cu_seqlens and targets of a forward pass, which tools also pass along under other names.

    Args:
        kwargs: what is left of its keyword arguments: `cu_seq_lens_q`, `_k` and `seq_idx` (each token's sequence) tell
            of packed sequences, `shift_labels` are targets.
        outputs: what these models do not return; asked for by the configuration, it is refused there.

    Raises:
        ValueError: one of `outputs` is asked for, or one thing is said twice.
        TypeError: an argument that no model has; the nearest that this one has is named.
    """
    outputs["output_router_logits"] = kwargs.get("output_router_logits")
    for name, value in outputs.items():
        if value:
            raise ValueError(f"{name}=True is not offered by {type(model).__name__}.")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal=False is not offered: these models read from left to right.")
    names = {"cu_seq_lens_q", "cu_seq_lens_k", "is_causal", "output_router_logits", "seq_idx", "shift_labels"}
    for name in kwargs:
        if name not in _NOT_OURS | names:
            known = inspect.signature(type(model).forward).parameters
            close = difflib.get_close_matches(name, [*known, *names], n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            if RENAMED.get(name) in known:
                hint = f": it is now called {RENAMED[name]!r}"
            raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}{hint}")
    borders, keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if borders is not None and keys is not None and not torch.equal(borders, keys):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: packed sequences read themselves only.")
    borders = keys if borders is None else borders
    if borders is None and kwargs.get("seq_idx") is not None:
        borders = _borders_of(kwargs["seq_idx"])
    cu_seqlens = one_of(cu_seqlens=cu_seqlens, cu_seq_lens_q=borders)
    return cu_seqlens, one_of(targets=targets, shift_labels=kwargs.get("shift_labels"))


def _borders_of(seq_idx: torch.Tensor) -> torch.Tensor:
    """cu_seqlens [N + 1] of the sequences that seq_idx [1, T] numbers, in one row."""
    if seq_idx.dim() != 2 or seq_idx.shape[0] != 1:
        raise ValueError(f"seq_idx must be [1, T]: packed sequences stand in one row, got {list(seq_idx.shape)}.")
    new = (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero().flatten() + 1
    return torch.cat((new.new_zeros(1), new, new.new_tensor([seq_idx.shape[1]]))).to(torch.int32)


def one_of(**given: torch.Tensor | None) -> torch.Tensor | None:
    """The argument that is given; ValueError where several are."""
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise ValueError(f"give {' or '.join(named)}, not both.")
    return next(iter(named.values()), None)
