"""Models from folders and hub ids: `load` reads the weights, `read_config` the configuration alone."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Collection, Iterator
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

from oncelm.models.checks import refuse_incomplete, unsafe_pickle
from oncelm.models.generation_keys import check_generation, check_generation_file
from oncelm.models.llama import check_llama_keys
from oncelm.models.own_config import Dtype, OwnConfig
from oncelm.models.registry import (
    FAMILIES,
    adoption,
    families,
    family,
    official_format,
    official_formats,
    presets,
    titles,
)
from oncelm.models.sharded import is_sharded_folder, read_shards
from oncelm.models.size import check_fits, check_stored
from oncelm.utils.checksums import check_folder, is_checkpoint
from oncelm.utils.constraints import Constraint, Flag, check_all
from oncelm.utils.device import resolve_device, resolve_dtype
from oncelm.utils.errors import check_choice, is_out_of_memory, renamed, shown
from oncelm.utils.files import bring_back
from oncelm.utils.settings import read_json

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
    quantization: str | None = None,
    verify: bool | None = None,
    config: PreTrainedConfig | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """Load a model in evaluation mode.

    Args:
        path: an official YOCO folder, a Hugging Face folder (OnceLM's or any causal LM that transformers knows), a
            training run's checkpoint, or a hub id.
        device: "cpu", "cuda", ...; None means a GPU if there is one.
        dtype: "float32", "bfloat16", ... or a torch.dtype; None means the checkpoint's.
        compile: compile the layers on their first long input, of a model that can (`model.compile_layers`).
        quantization: "float8", of a model that can (`Family.quantizations`); None means the model's dtype.
        verify: compare every file of the folder with its checksum first (OnceLM writes them with every model). None
            does so for a training run's checkpoint, which is as it was written or of no use.
        config: what `read_config(path, **overrides)` gave, which is then not read again.
        overrides: keys to change in the configuration of OnceLM's own models, such as rope_theta. With
            `mem_layers=[...]` any LLaMA-family model is loaded as a LongLLaMA with memory in these layers.

    Raises:
        FileNotFoundError: no such folder.
        MemoryError: there is no room for it.
        ValueError: not a model, damaged, unsafe, or with missing or wrong-size tensors (and unexpected ones, where the
            model is OnceLM's own), also where `overrides` ask for other sizes; with `verify`, other files than were
            written (each is named), or no checksums; `compile` or `quantization` for a model that offers no such thing.
    """
    if "gemm" in overrides:
        raise renamed("argument", "gemm", "quantization")
    precision, target = None if dtype is None else resolve_dtype(dtype), resolve_device(device)
    bring_back(path)
    if verify or (verify is None and is_checkpoint(Path(path))):
        check_folder(path, optional_parts=verify is None)
    if config is None:
        config = read_config(path, **overrides)
    try:
        if (official := official_format(path)) is not None:
            model = official.read_official(path, precision, config).to(target)
        else:
            model = _read_model(path, target, precision, config)
    except ValueError as error:
        if not overrides:
            raise
        raise ValueError(f"{error} (Read with {shown(overrides)}, which its weights have to fit.)") from error
    return set_execution(model, path, compile, quantization)


def set_execution(
    model: PreTrainedModel, name: str | os.PathLike[str], compile: bool, quantization: str | None
) -> PreTrainedModel:
    """The model, run so; ValueError where its family offers no such thing."""
    able = family(model.config)
    for option, value, has in (("compile", compile, "can_compile"), ("quantization", quantization, "quantizations")):
        if value and not getattr(able, has):
            those = titles(lambda one, has=has: getattr(one, has))  # type: ignore[misc]
            raise ValueError(f"{option} is an option of {those} models; {name} is a {type(model).__name__}.")
    if able.quantizations:
        model.set_quantization(quantization)
    if able.can_compile:
        model.compile_layers(compile)
    return model


def _read_model(
    path: str | os.PathLike[str], target: torch.device, precision: torch.dtype | None, config: PreTrainedConfig
) -> PreTrainedModel:
    is_folder = Path(path).is_dir()
    with errors_in_one_line(path), quiet_transformers(progress_bars=not is_folder):
        check_stored(path, config)
        check_fits(config, precision or config.dtype, target)
        check_generation_file(path)
        shards = read_shards(path) if is_sharded_folder(path) else None
        reader = AutoModelForCausalLM if shards is None else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, info = reader.from_pretrained(
            path if shards is None else None,
            state_dict=shards,
            config=config,
            dtype=precision or "auto",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are listed in `info` instead, and refused below
            output_loading_info=True,
        )
    refuse_incomplete(path, info, unexpected_too=False)
    if model.generation_config is not None:
        check_generation(path, vars(model.generation_config))  # of a hub id; and what older folders say in config.json
    return model.to(target).eval()


def read_config(path: str | os.PathLike[str], **overrides: Any) -> PreTrainedConfig:
    """The configuration of a model folder or hub id, as `load` would use it; no weights are read."""
    bring_back(path)
    if (official := official_format(path)) is not None:
        config = official.read_params(path)
        if not overrides:
            return config
        config_class = own_config_class(path, config.model_type, overrides)
        stated = {key: getattr(config, key) for key in config.stated_keys()}
        return config_class(**config_class.changed(stated, overrides))
    settings = _check_folder(path)
    with errors_in_one_line(path), quiet_transformers():
        check_all(settings, OF_ANY_MODEL)
        if settings.get("model_type") == LlamaConfig.model_type:
            check_llama_keys(settings)
        if not overrides and settings.get("model_type") not in FAMILIES:
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
        settings = settings or PreTrainedConfig.get_config_dict(path)[0]  # of a hub id
        config_class = own_config_class(path, settings.get("model_type"), overrides)
        return config_class.from_dict(settings, name_or_path=str(path), **overrides)


def own_config_class(path: str | os.PathLike[str], model_type: str | None, keys: Collection[str]) -> type[OwnConfig]:
    """The class that reads the configuration of a model of this type with these keys changed: its own family's, or that
    of a family that adopts it; ValueError where there is none, or it has no such key."""
    takers = [one for one in families() if model_type == one.config_class.model_type]
    takers += [one for one in families() if one.adopts.get(model_type) in keys]
    if not takers:
        raise ValueError(
            f"{path} is a model of type {model_type}, in which {', '.join(keys)} cannot be changed."
            f"{adoption(model_type)}"
        )
    config_class = takers[0].config_class
    for key in keys:
        others = titles(lambda one, key=key: key in one.config_class.own_keys())  # type: ignore[misc]
        if key not in config_class.own_keys() and others:
            raise ValueError(f"{path} is a model of type {model_type}; {key} is a key of {others} models.")
        check_choice(f"{config_class.__name__} key", key, config_class.own_keys())
    return config_class


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
        hint = (
            " That is a preset: a shape without weights; `oncelm train` makes some." if str(path) in presets() else ""
        )
        raise FileNotFoundError(f"no model folder at {path}.{hint}")
    config = folder / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) if folder.is_dir() else "a file"
        others = "".join(f" or {one.PARAMS} and {one.WEIGHTS} (official format)" for one in official_formats())
        raise ValueError(
            f"{path} is no model folder: it needs config.json (Hugging Face){others}; found: {found or 'nothing'}."
        )
    settings = read_json(config)
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ValueError(f"{config} describes no model: it must be a JSON object with a key model_type.")
    return settings


def _may_be_hub_id(path: str | os.PathLike[str]) -> bool:
    owner, slash, name = str(path).partition("/")
    return bool(owner and slash and name) and "/" not in name and owner[0] not in ".~"


@contextlib.contextmanager
def errors_in_one_line(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever transformers raises for a model into a ValueError of one line that names `path`.

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
