"""Checks of every model: its inputs, its weight files, and whether a cache was made for it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_tokens(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    config: Any,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The one of the two that is given; ValueError unless it is one, of the right shape, with ids of the vocabulary.

    Ids on the CPU are checked there and copied to `device`, without waiting for it.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give input_ids or inputs_embeds, one of them.")
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise ValueError(f"inputs_embeds must be [B, T, {config.hidden_size}], got {list(inputs_embeds.shape)}.")
        return inputs_embeds
    assert input_ids is not None
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be [B, T] integers, got {input_ids.dtype} {list(input_ids.shape)}.")
    # on a GPU a bad id ends the process, so it is worth the wait; one decoded token is the model's own
    has_values = input_ids.numel() and input_ids.device.type != "meta"
    if has_values and (input_ids.device.type == "cpu" or input_ids.shape[1] > 1):
        low, high = torch.stack(input_ids.aminmax()).tolist()
        if low < 0 or high >= config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"input_ids has {bad}; allowed: 0..{config.vocab_size - 1} (vocab_size).")
    ids = input_ids.long()
    return ids if device is None or ids.device.type != "cpu" else ids.to(device, non_blocking=True)


def fingerprint(model: PreTrainedModel, keys: Iterable[str]) -> str:
    """A short hash of some configuration keys and of a sample of every parameter: whose cache a file is."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps({key: getattr(model.config, key) for key in keys}, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


WORDS = 4096  # of 8 bytes in a row of what `weights_digest` sums up


def weights_digest(model: PreTrainedModel) -> str:
    """A hash of every parameter's name, dtype, shape and bits: of what may not change, not even by rounding.

    The device sums up its bits, as whole numbers along the rows and the columns of a table, so only sums go to the
    host: milliseconds on a GPU, and on a CPU as long as memory takes to be read twice.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        content = parameter.detach().contiguous().view(-1).view(torch.uint8)
        if content.storage_offset() % 8:  # of a larger tensor, at a place where no word begins
            content = content.clone()
        whole = len(content) - len(content) % (8 * WORDS)
        table = content[:whole].view(torch.int64).view(-1, WORDS)
        for part in (table.sum(0), table.sum(1), content[whole:]):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def refuse_incomplete(path: object, info: dict[str, Any], unexpected_too: bool = True) -> None:
    """ValueError for missing and wrong-size tensors, where transformers only warns, and for unexpected ones; or else a
    warning of these, which models of other families may leave unused."""
    if wrong := sorted(info["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise ValueError(f"{path}: {name} is {list(found)}, config.json asks for {list(expected)}.")
    for problem in ("missing", "unexpected"):
        if names := sorted(info[f"{problem}_keys"]):
            some = f"{len(names)} {problem} tensors: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            if problem == "missing" or unexpected_too:
                raise ValueError(f"{path} has {some}.")
            logger.warning("%s has %s.", path, some)


def unsafe_pickle(path: str | os.PathLike[str]) -> ValueError:
    """The error for a checkpoint that asks the unpickler for anything but tensors and plain data."""
    return ValueError(
        f"{path} holds Python objects that are not tensors (or is damaged): loading it could run code, so it is "
        "refused. A checkpoint must be a plain dict of tensors."
    )
