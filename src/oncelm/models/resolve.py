"""Models by name: a preset, a folder, a hub id or a GGUF file.

`describe` gives the configuration, `build` the model. All code that takes a model's name calls one of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from oncelm.models.gguf import is_gguf, read_gguf, read_gguf_config
from oncelm.models.llama import check_llama_keys
from oncelm.models.load import load, own_config_class, quiet_transformers, read_config, set_execution
from oncelm.models.registry import FAMILIES, families, presets
from oncelm.models.size import check_fits, empty_model
from oncelm.utils.device import resolve_device, resolve_dtype
from oncelm.utils.errors import check_choice, renamed, unknown
from oncelm.utils.files import bring_back


def is_preset(name: str | os.PathLike[str]) -> bool:
    """Whether a name stands for a shape without weights; a file or folder of that name comes first."""
    return str(name) in presets() and not Path(name).exists()


def describe(name: str | os.PathLike[str], **overrides: Any) -> PreTrainedConfig:
    """The configuration of a model; no weights are read.

    Args:
        name: a preset of YOCO (`oncelm info` lists them) or the Llama beside it (llama-160m), an official YOCO folder,
            a Hugging Face folder, a training run's checkpoint, a hub id, or a GGUF file.
        overrides: keys to change: any of a preset's configuration, those of YOCO and LongLLaMA folders. With
            `mem_layers=[...]` a preset or folder of the LLaMA family is described as a LongLLaMA.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no such name (with the nearest), no model, or a key or value that it cannot have.

    >>> describe("yoco-tiny", self_decoder="sliding_window", window_size=64).window_size
    64
    >>> describe("llama-160m", mem_layers=[8]).model_type
    'longllama'
    """
    if is_preset(name):
        return _preset_config(str(name), overrides)
    if is_gguf(name):
        if overrides:
            raise ValueError(
                f"{name} is a GGUF file: for {', '.join(overrides)} make a folder of it, `oncelm convert`."
            )
        return read_gguf_config(name)
    bring_back(name)
    if not Path(name).exists() and "/" not in str(name):
        raise unknown("model", str(name), [*presets(), "a model folder", "a hub id"])
    return read_config(name, **overrides)


def build(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    weights: bool = True,
    seed: int = 0,
    compile: bool = False,
    quantization: str | None = None,
    config: PreTrainedConfig | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A model, in evaluation mode: with its weights, or of a preset with random ones.

    Args:
        name, overrides: as for `describe`.
        device: "cpu", "cuda", ...; None means a GPU if there is one.
        dtype: "float32", "bfloat16", ... or a torch.dtype; None means the stored one, float32 of a preset.
        weights: False makes the model without values, on the meta device, and reads none.
        seed: of a preset's weights.
        compile, quantization: as for `load`.
        config: what `describe(name, **overrides)` gave, which is then not read again.

    Raises:
        FileNotFoundError, MemoryError, ValueError: as for `describe` and `load`.
    """
    if "gemm" in overrides:
        raise renamed("argument", "gemm", "quantization")
    if config is None:
        config = describe(name, **overrides)
    if not weights:
        with quiet_transformers():
            return empty_model(config)
    if is_preset(name):
        model = fresh(config, resolve_device(device), dtype, seed=seed).eval()
    elif is_gguf(name):
        model = read_gguf(name, None if dtype is None else resolve_dtype(dtype))[0].to(resolve_device(device))
    else:
        return load(name, device, dtype, compile=compile, quantization=quantization, config=config, **overrides)
    return set_execution(model, name, compile, quantization)


def build_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of a preset, of YOCO or Llama, with fresh weights to be trained: in float32, on the default device.

    Args:
        name: such as yoco-160m or llama-160m.
        seed: the weights are drawn from.
        overrides: keys of its configuration to change; with `mem_layers` a Llama is a LongLLaMA of that shape.

    Raises:
        ValueError: no such preset, or a key or value that it cannot have (with the nearest).
    """
    check_choice("preset", name, presets())
    return fresh(_preset_config(name, overrides), seed=seed)


def fresh(
    config: PreTrainedConfig,
    device: torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    seed: int = 0,
) -> PreTrainedModel:
    """A new model with weights drawn from `seed`; random numbers of the caller stay as they are.

    Args:
        device: None means the default one, a CPU unless `torch.device` was set.
        dtype: that the weights are drawn in; None means the configuration's, or else float32.

    Raises:
        ValueError: it is larger than the memory of this machine.
    """
    device = device or torch.get_default_device()
    options = {} if dtype is None else {"dtype": resolve_dtype(dtype)}
    check_fits(config, options.get("dtype"), device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, **options)


def _preset_config(name: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    settings = presets()[name]
    model_type = settings.pop("model_type")
    if model_type in FAMILIES or any(one.adopts.get(model_type) in overrides for one in families()):
        own = own_config_class(name, model_type, overrides)
        return own(**own.changed(settings, overrides))
    plain = AutoConfig.for_model(model_type)
    known = plain.to_dict()
    for key in overrides:
        check_choice(f"{type(plain).__name__} key", key, known)
    check_llama_keys(overrides)
    return type(plain)(**settings | overrides)
