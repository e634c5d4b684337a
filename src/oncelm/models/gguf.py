"""GGUF files (llama.cpp's format) of LLaMA-family models, read into a Hugging Face model and tokenizer.

transformers reads the file: it undoes the quantisation and the order of q and k rows, which GGUF stores permuted for
interleaved RoPE. Here its result is checked and completed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from oncelm.models.load import errors_in_one_line, quiet_transformers

MAGIC = b"GGUF"
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file that calls itself GGUF, or starts as one."""
    file = Path(path)
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return file.suffix == ".gguf" or stream.read(len(MAGIC)) == MAGIC


def read_gguf(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer with its chat template.

    Args:
        path: a GGUF file of architecture llama.
        dtype: of the weights; None means float32.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: damaged, of another architecture, or incomplete.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{path}: reading GGUF files needs `pip install 'oncelm[gguf]'`")
    file = Path(path)
    with errors_in_one_line(path), quiet_transformers():
        fields = _fields(file)
        if fields.get("general.architecture") != "llama":
            raise ValueError(
                f"{path} is a GGUF file of architecture {fields.get('general.architecture')!r}; only LLaMA-family "
                "models ('llama') can be read."
            )
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype or torch.float32, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{path} lacks {len(missing)} tensors: {', '.join(missing[:4])}.")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _forget_the_file(model)
    if fields.get("tokenizer.ggml.pre") == "smollm":  # transformers leaves out that digits stand alone
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    for name, attribute in SPECIAL_TOKENS.items():  # transformers before 5.23 reads some of them wrongly
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(token)))
    return model.eval(), tokenizer


def _fields(file: Path) -> dict[str, Any]:
    """The single-valued metadata of a file."""
    from gguf import GGUFReader

    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{file} is no GGUF file: it does not start with {MAGIC.decode()}.")
    special = (f"tokenizer.ggml.{name}_token_id" for name in SPECIAL_TOKENS)
    names = ("general.architecture", "tokenizer.ggml.pre", *special)
    fields = GGUFReader(file).fields
    return {name: fields[name].contents() for name in names if name in fields}


def _forget_the_file(model: PreTrainedModel) -> None:
    """The weights are plain numbers now: without these marks transformers can save them."""
    for owner, names in (
        (model, ("hf_quantizer", "quantization_method", "is_quantized")),
        (model.config, ("quantization_config", "_model_name_or_path")),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)
