"""GGUF files (llama.cpp's format) of LLaMA-family models, read into a Hugging Face model and tokenizer.

transformers reads the file: it undoes the quantisation and the order of q and k rows, which GGUF stores permuted for
interleaved RoPE. Here its result is checked and completed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from oncelm.models.load import check_complete, errors_in_one_line, quiet_transformers
from oncelm.utils.errors import check_whole

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
HEADS, KV_HEADS, HEAD_DIM = "llama.attention.head_count", "llama.attention.head_count_kv", "llama.rope.dimension_count"
WIDTH, BLOCKS = "llama.embedding_length", "llama.block_count"
REQUIRED = (HEADS, WIDTH, BLOCKS, "llama.feed_forward_length", "llama.context_length")
OPTIONAL = (KV_HEADS, HEAD_DIM, "llama.vocab_size")
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
        ValueError: damaged, cut off, of another architecture, incomplete, or with metadata that are not its tensors'.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{path}: reading GGUF files needs `pip install 'oncelm[gguf]'`")
    file = Path(path)
    with errors_in_one_line(path), quiet_transformers():
        reader = _open(file)
        fields = _fields(reader)
        if fields.get("general.architecture") != "llama":
            raise ValueError(
                f"{path} is a GGUF file of architecture {fields.get('general.architecture')!r}; only LLaMA-family "
                "models ('llama') can be read."
            )
        _check_sizes(path, fields, {tensor.name: tensor.shape.tolist() for tensor in reader.tensors})
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype or torch.float32,
            ignore_mismatched_sizes=True,  # they are listed in `info` instead, and refused
            output_loading_info=True,
        )
        check_complete(path, info, shapes_in="its metadata")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _forget_the_file(model)
    if fields.get("tokenizer.ggml.pre") == "smollm":  # transformers leaves out that digits stand alone
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    for name, attribute in SPECIAL_TOKENS.items():  # transformers before 5.23 reads some of them wrongly
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(token)))
    return model.eval(), tokenizer


def _open(file: Path) -> GGUFReader:
    """The metadata and tensors of a file that is whole."""
    from gguf import GGUFReader

    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{file} is no GGUF file: it does not start with {MAGIC.decode()}.")
    try:
        return GGUFReader(file)
    except Exception as error:  # numpy, enum and unicode errors: of what stands where a number or a name should be
        if isinstance(error, MemoryError):
            raise
        size, kind = file.stat().st_size, type(error).__name__
        raise ValueError(f"{file} is damaged, or cut off after {size:,} bytes ({kind}: {error}).") from error


def _fields(reader: GGUFReader) -> dict[str, Any]:
    """The metadata used here."""
    special = (f"tokenizer.ggml.{name}_token_id" for name in SPECIAL_TOKENS)
    names = ("general.architecture", "tokenizer.ggml.pre", *special, *REQUIRED, *OPTIONAL)
    return {name: reader.fields[name].contents() for name in names if name in reader.fields}


def _check_sizes(path: str | os.PathLike[str], fields: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Refuse sizes that are missing or not those of the tensors; transformers takes defaults, or drops layers."""
    check_whole(1, **{name: fields.get(name) for name in REQUIRED})
    check_whole(1, **{name: fields[name] for name in OPTIONAL if name in fields})
    heads = fields[HEADS]
    head_dim = fields.get(HEAD_DIM, fields[WIDTH] // heads)
    for name, count, tensor in ((HEADS, heads, "attn_q"), (KV_HEADS, fields.get(KV_HEADS, heads), "attn_k")):
        shape = shapes.get(f"blk.0.{tensor}.weight")  # (columns, rows)
        if shape and shape[1] != count * head_dim:
            raise ValueError(
                f"{path} has {name} {count}: of dimension {head_dim} they are {count * head_dim} rows of "
                f"blk.0.{tensor}.weight, which has {shape[1]}."
            )
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    if blocks > fields[BLOCKS]:  # fewer are missing tensors
        raise ValueError(f"{path} has {BLOCKS} {fields[BLOCKS]} and the tensors of {blocks} blocks.")


def _forget_the_file(model: PreTrainedModel) -> None:
    """The weights are plain numbers now: without these marks transformers can save them."""
    for owner, names in (
        (model, ("hf_quantizer", "quantization_method", "is_quantized")),
        (model.config, ("quantization_config", "_model_name_or_path")),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)
