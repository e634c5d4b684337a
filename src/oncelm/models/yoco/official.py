"""Official YOCO folders (`params.json` and `checkpoint.pth`), read and written.

Parameters have the same names in both formats, so only the configuration is converted, and everything is checked.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from oncelm.models.checks import unsafe_pickle
from oncelm.models.size import empty_model
from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.mixers import find_mixer
from oncelm.models.yoco.modeling import YocoForCausalLM
from oncelm.utils.checksums import write_checksums
from oncelm.utils.device import DTYPES
from oncelm.utils.errors import is_out_of_memory, printable, shown, unknown
from oncelm.utils.files import atomic_folder
from oncelm.utils.settings import read_json

PARAMS, WEIGHTS = "params.json", "checkpoint.pth"
TOKENIZER = "cl100k_base"  # which no folder brings along

# official name -> ours
_KEYS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_self_heads": "num_self_heads",
    "n_attn_heads": "num_attention_heads",
    "n_attn_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
_REQUIRED = ("dim", "n_layers", "hidden_dim", "n_self_heads", "n_attn_heads", "n_attn_kv_heads", "vocab_size")
_INTEGERS = (*_REQUIRED, "sliding_window")
_ZIP_MAGIC = b"PK\x03\x04"
# settings of a run, not of the model
_IGNORED = ("max_batch_size", "max_seq_len", "model_parallel_size", "load_checkpoint")


def is_official_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has an official checkpoint's two files."""
    return (Path(path) / PARAMS).is_file() and (Path(path) / WEIGHTS).is_file()


def read_params(path: str | os.PathLike[str]) -> YocoConfig:
    """The configuration in an official folder's params.json."""
    file = Path(path) / PARAMS
    params = read_json(file, encoding="utf-8-sig")
    if not isinstance(params, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(params).__name__}.")
    known = [*_KEYS, "n_layers", "sliding_window"]
    for key, value in params.items():
        if key in _IGNORED:
            continue
        if key not in known:
            raise unknown(f"key in {file}", key, known)
        if key == "sliding_window" and value is None:
            continue
        kind: tuple[type, ...] = (int,) if key in _INTEGERS else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{file}: {key} must be {'an integer' if kind == (int,) else 'a number'}, got {shown(value)}."
            )
    if missing := [key for key in _REQUIRED if key not in params]:
        raise ValueError(f"{file} lacks {', '.join(missing)}.")
    ours: dict[str, Any] = {_KEYS[key]: value for key, value in params.items() if key in _KEYS}
    half, odd = divmod(params["n_layers"], 2)
    if odd:
        raise ValueError(
            f"{file}: n_layers must be even (half self-, half cross-decoder), got {shown(params['n_layers'])}."
        )
    window = params.get("sliding_window")
    if window is not None:
        ours.update(self_decoder="sliding_window", window_size=window)
    try:
        return YocoConfig(num_self_decoder_layers=half, num_cross_decoder_layers=half, **ours)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_official(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, config: YocoConfig | None = None
) -> YocoForCausalLM:
    """Load an official folder; `dtype` None keeps the checkpoint's, `config` None reads params.json.

    Raises:
        ValueError: a damaged or unsafe checkpoint, a missing, unexpected or wrong-size tensor.
    """
    config = config or read_params(path)
    state = _read_weights(Path(path) / WEIGHTS)
    model = empty_model(config)
    expected = model.state_dict()
    for problem, names in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if names:
            raise ValueError(
                f"{Path(path) / WEIGHTS} {problem} tensors: {', '.join(map(printable, sorted(names)[:4]))}."
            )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{Path(path) / WEIGHTS}: {name} is {list(tensor.shape)}, "
                f"{PARAMS} asks for {list(expected[name].shape)}."
            )
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{Path(path) / WEIGHTS}: {name} must hold floating point numbers, got {tensor.dtype}.")
    if torch.equal(state["embed_tokens.weight"], state["output_projection.weight"]):
        config.tie_word_embeddings = True
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.to(dtype or state["embed_tokens.weight"].dtype)
    return model.eval()


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        if stream.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            raise ValueError(
                f"{file} is no PyTorch checkpoint: it does not start as one (torch.save writes a zip file)."
            )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise unsafe_pickle(file) from error
    except Exception as error:  # a damaged file can lead torch's reader anywhere
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{file} is damaged: {type(error).__name__}, {str(error).partition(chr(10))[0]}") from error
    if isinstance(state, dict) and set(state) == {"model"}:  # the training code wraps it
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} must hold a dict of tensors by name.")
    return state


def fixed_keys(config: YocoConfig) -> dict[str, Any]:
    """Keys that have one value only in the official format."""
    return {
        "layout": "stacked",
        "rope_pairing": "interleaved",
        "rope_spacing": "inclusive",
        "gate_logit_normalizer": 16,
        "scale_embeddings": True,
        "num_self_decoder_layers": config.num_cross_decoder_layers,
        "num_self_key_value_heads": config.num_self_heads,
    }


def write_official(model: YocoForCausalLM, path: str | os.PathLike[str]) -> None:
    """Save a model as an official folder; ValueError where the official code has no such model."""
    config = model.config
    if config.self_decoder is None:
        raise ValueError(f"the official format has one mixer in all layers; this model has {config.self_layer_types}.")
    of_mixer = find_mixer(config.self_decoder).official_params(config)
    for key, value in fixed_keys(config).items():
        if getattr(config, key) != value:
            raise ValueError(f"the official format has only {key}={value!r}; this model has {getattr(config, key)!r}.")
    params = {official: getattr(config, ours) for official, ours in _KEYS.items()}
    params |= {"n_layers": config.num_hidden_layers, **of_mixer}
    with atomic_folder(path) as folder:
        torch.save({name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
        (folder / PARAMS).write_text(json.dumps(params, indent=2) + "\n")
        write_checksums(folder)
