"""How large a model would be, computed before memory is allocated for it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from oncelm.utils.memory import check_memory

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.distcp", "*.gguf")
MOST_LAYERS = 4096
FEW = 2**28  # parameters: a GiB of float32


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `config` describes, without memory for its weights (on the meta device).

    Raises:
        ValueError: no computer could hold it, or so many layers that listing them would take minutes.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, got {layers}.")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except RuntimeError as error:  # of a tensor with more elements than there are numbers
        raise ValueError(f"no model can have the sizes in its configuration: {str(error).splitlines()[0]}") from error


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model that `config` describes."""
    return sum(parameter.numel() for parameter in empty_model(config).parameters())


def check_fits(config: PreTrainedConfig, dtype: torch.dtype | None, device: torch.device) -> None:
    """ValueError where the model that `config` describes is larger than the memory of this machine."""
    if device.type == "cpu" and not getattr(config, "quantization_config", None):
        parameters = count_parameters(config)
        check_memory(parameters * (dtype or torch.float32).itemsize, f"a model of {parameters:,} parameters", device)


def check_stored(path: str | os.PathLike[str], config: PreTrainedConfig) -> None:
    """ValueError where a folder's configuration asks for many more parameters than its weight files have bytes.

    transformers would make those that are missing first, of random numbers, and say so afterwards. A few are left to
    it: what is wrong with the files themselves shows then.
    """
    stored = sum(file.stat().st_size for pattern in WEIGHT_FILES for file in Path(path).glob(pattern))
    if not stored or getattr(config, "quantization_config", None):  # some pack two numbers into a byte
        return
    parameters = count_parameters(config)
    if parameters > max(stored, FEW):
        raise ValueError(
            f"config.json asks for {parameters:,} parameters, but its weight files are {stored:,} bytes in all: they "
            "are of another model."
        )
