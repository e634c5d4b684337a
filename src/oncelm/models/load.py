"""Models by name: `load` reads weights from a folder or hub id, `build_model` starts one from a preset."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from oncelm.models.compiling import CompilesLayers
from oncelm.models.generation_keys import check_generation, check_generation_file
from oncelm.models.longllama.config import LongLlamaConfig, check_llama_keys
from oncelm.models.own_config import Dtype
from oncelm.models.sharded import is_sharded_folder, read_shards
from oncelm.models.size import check_fits, check_stored
from oncelm.models.yoco.modeling import YocoForCausalLM
from oncelm.models.yoco.official import is_official_folder, read_official, read_params, unsafe_pickle
from oncelm.models.yoco.presets import PRESETS, preset_config
from oncelm.utils.checksums import check_folder, is_checkpoint
from oncelm.utils.constraints import Constraint, Flag, check_all
from oncelm.utils.device import resolve_device, resolve_dtype
from oncelm.utils.errors import check_choice, is_out_of_memory
from oncelm.utils.files import bring_back
from oncelm.utils.settings import read_json

logger = logging.getLogger(__name__)

# keys of config.json that transformers takes as they are, whatever the model
OF_ANY_MODEL: dict[str, Constraint] = {
    **dict.fromkeys(("dtype", "torch_dtype"), Dtype()),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict", "use_cache"), Flag(optional=True)),
}
LONGEST_REASON = 1000  # characters: some of transformers' errors list every model there is
TERSE_ERRORS = (LookupError, ArithmeticError, AssertionError, AttributeError)  # a KeyError's text is the key alone


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    compile: bool = False,
    gemm: str | None = None,
    verify: bool | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """Load a model in evaluation mode.

    Args:
        path: an official YOCO folder, a Hugging Face folder (OnceLM's or any causal LM that transformers knows), a
            training run's checkpoint, or a hub id.
        device: "cpu", "cuda", ...; None means a GPU if there is one.
        dtype: "float32", "bfloat16", ... or a torch.dtype; None means the checkpoint's.
        compile: compile the layers of a YOCO or LongLLaMA on their first long input (`model.compile_layers`).
        gemm: "float8" for a YOCO's prefill (`YocoForCausalLM.set_gemm`); None means the model's dtype.
        verify: compare every file of the folder with its checksum first (OnceLM writes them with every model). None
            does so for a training run's checkpoint, which is as it was written or of no use.
        overrides: keys of LongLlamaConfig to change in a LongLLaMA. With `mem_layers=[...]` any LLaMA-family model is
            loaded as a LongLLaMA with memory in these layers.

    Raises:
        FileNotFoundError: no such folder.
        MemoryError: there is no room for it.
        ValueError: not a model, damaged, unsafe, or with missing or wrong-size tensors (and unexpected ones, where the
            model is OnceLM's own); with `verify`, other files than were written (each is named), or no checksums;
            `compile` for a model that is neither YOCO nor LongLLaMA, `gemm` for one that is no YOCO.
    """
    precision = None if dtype is None else resolve_dtype(dtype)
    bring_back(path)
    if verify or (verify is None and is_checkpoint(Path(path))):
        check_folder(path, optional_parts=verify is None)
    model = _read_model(path, resolve_device(device), precision, overrides)
    if isinstance(model, YocoForCausalLM):
        model.set_gemm(gemm)
    elif gemm:
        raise ValueError(f"gemm is an option of YOCO models; {path} is a {type(model).__name__}.")
    if isinstance(model, CompilesLayers):
        model.compile_layers(compile)
    elif compile:
        raise ValueError(f"compile is an option of YOCO and LongLLaMA models; {path} is a {type(model).__name__}.")
    return model


def _read_model(
    path: str | os.PathLike[str], target: torch.device, precision: torch.dtype | None, overrides: dict[str, Any]
) -> PreTrainedModel:
    if is_official_folder(path) and not overrides:
        return read_official(path, precision).to(target)
    config = read_config(path, **overrides)
    is_folder = Path(path).is_dir()
    with errors_in_one_line(path), quiet_transformers(progress_bars=not is_folder):
        check_stored(path, config)
        check_fits(config, precision or config.dtype, target)
        check_generation_file(path)
        shards = read_shards(path) if is_sharded_folder(path) else None
        model_class = AutoModelForCausalLM if shards is None else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, info = model_class.from_pretrained(
            path if shards is None else None,
            state_dict=shards,
            config=config,
            dtype=precision or "auto",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are listed in `info` instead, and refused below
            output_loading_info=True,
        )
    check_complete(path, info)
    if model.generation_config is not None:
        check_generation(path, vars(model.generation_config))  # of a hub id; and what older folders say in config.json
    return model.to(target).eval()


def read_config(path: str | os.PathLike[str], **overrides: Any) -> PreTrainedConfig:
    """The configuration of a model folder or hub id, as `load` would use it; no weights are read."""
    bring_back(path)
    if is_official_folder(path):
        if overrides:
            raise ValueError(f"{path} is an official YOCO folder: {', '.join(overrides)} are keys of LongLLaMA models.")
        return read_params(path)
    settings = _check_folder(path)
    with errors_in_one_line(path), quiet_transformers():
        check_all(settings, OF_ANY_MODEL)
        if settings.get("model_type") == LlamaConfig.model_type:
            check_llama_keys(settings)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not overrides:
            return config
        _check_overrides(path, config, overrides)
        return LongLlamaConfig.from_pretrained(path, **overrides)


def _check_overrides(path: str | os.PathLike[str], config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    for key in overrides:
        check_choice("LongLlamaConfig key", key, LongLlamaConfig.own_keys())
    if config.model_type not in (LlamaConfig.model_type, LongLlamaConfig.model_type):
        raise ValueError(
            f"{path} is a model of type {config.model_type}; {', '.join(overrides)} are for LLaMA-family models."
        )
    if config.model_type == LlamaConfig.model_type and "mem_layers" not in overrides:
        raise ValueError(f"{path} is a plain LLaMA; name the layers that get memory with mem_layers=[...].")


def build_model(name: str, *, seed: int = 0, **overrides: Any) -> YocoForCausalLM:
    """A model of a preset (`oncelm info` lists them) with fresh weights drawn from `seed`, in float32 on the CPU."""
    config = preset_config(name, **overrides)
    check_fits(config, None, torch.get_default_device())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return YocoForCausalLM(config)


@contextlib.contextmanager
def quiet_transformers(progress_bars: bool = False) -> Iterator[None]:
    """Within, transformers logs errors only, and shows progress bars only if asked to."""
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not progress_bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _check_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a folder's config.json; none for what may be a hub id."""
    folder = Path(path)
    if not folder.exists():
        if _may_be_hub_id(path):
            return {}
        hint = " That is a preset: a shape without weights; `oncelm train` makes some." if str(path) in PRESETS else ""
        raise FileNotFoundError(f"no model folder at {path}.{hint}")
    config = folder / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) if folder.is_dir() else "a file"
        raise ValueError(
            f"{path} is no model folder: it needs config.json (Hugging Face) or params.json and checkpoint.pth "
            f"(official YOCO); found: {found or 'nothing'}."
        )
    settings = read_json(config)
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ValueError(f"{config} describes no model: it must be a JSON object with a key model_type.")
    return settings


def _may_be_hub_id(path: str | os.PathLike[str]) -> bool:
    owner, slash, name = str(path).partition("/")
    return bool(owner and slash and name) and "/" not in name and owner[0] not in ".~"


def check_complete(path: str | os.PathLike[str], info: dict[str, Any], shapes_in: str = "config.json") -> None:
    """What transformers only warns of: parts of the model that would be random numbers."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise ValueError(f"{path} lacks {_some(missing)}.")
    if mismatched:
        name, found, expected = mismatched[0]
        raise ValueError(f"{path}: {name} is {list(found)}, {shapes_in} asks for {list(expected)}.")
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning("%s: not used by this model: %s.", path, _some(unexpected))


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


@contextlib.contextmanager
def errors_in_one_line(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever is wrong with a model inside transformers, told as a ValueError of one line that names `path`.

    Too little memory says nothing of the model: a MemoryError.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise unsafe_pickle(path) from error
    except Exception as error:  # config classes, safetensors and torch each raise their own
        reason = _reason(error)
        if is_out_of_memory(error):
            raise MemoryError(f"no room for the model from {path}: {reason}") from error
        where = str(path) if Path(path).exists() else f"{path} (no such folder, so taken for a Hugging Face hub id)"
        raise ValueError(
            reason if reason.startswith(str(path)) else f"cannot load a model from {where}: {reason}"
        ) from error


def _reason(error: Exception) -> str:
    """An error's text in one line, with its type where the text alone may say nothing."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST_REASON:  # the cause may stand at either end
        text = f"{text[: LONGEST_REASON // 2]} ... {text[-LONGEST_REASON // 2 :]}"
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, TERSE_ERRORS) else text
