"""A GGUF file as a model and its tokenizer."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from oncelm.models.checks import refuse_incomplete
from oncelm.models.gguf.config import read_config
from oncelm.models.gguf.header import MAGIC, Header, read_header
from oncelm.models.gguf.tokenizer import end_tokens, read_tokenizer, special_ids
from oncelm.models.gguf.weights import ROPE_FACTORS, check_tensors, read_weights, unpack
from oncelm.models.load import errors_in_one_line, quiet_transformers


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

    Everything is checked by the file's head before a weight is read.

    Args:
        path: a GGUF file of architecture llama.
        dtype: of the weights; None means float32.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: damaged, cut off, of another architecture, incomplete, with metadata that are not its tensors', or
            with metadata or tensors that the model or its tokenizer would not honour.
    """
    file = Path(path)
    header, config = _read_head(file)
    with errors_in_one_line(path), quiet_transformers():
        tokenizer = read_tokenizer(file, header.metadata, config.vocab_size)
        model, info = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=read_weights(header, config, dtype or torch.float32),
            dtype=dtype or torch.float32,
            output_loading_info=True,
        )
    refuse_incomplete(path, info)
    return model.eval(), tokenizer


def read_gguf_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """The model's configuration; no weights are read. Errors as those of `read_gguf`."""
    return _read_head(Path(path))[1]


def read_gguf_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer alone; no weights are read. Errors as those of `read_gguf`."""
    file = Path(path)
    header, config = _read_head(file)
    with errors_in_one_line(path), quiet_transformers():
        return read_tokenizer(file, header.metadata, config.vocab_size)


def _read_head(file: Path) -> tuple[Header, LlamaConfig]:
    """The head of a file and the configuration that it describes, which its tensors fit."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{file}: reading GGUF files needs `pip install 'oncelm[gguf]'`")
    with errors_in_one_line(file), quiet_transformers():
        header = read_header(file)
        config = read_config(file, header, _rope_factors(header))
        check_tensors(file, header, config)
        ids = special_ids(header.metadata)
        config.bos_token_id, config.pad_token_id = ids.get("bos"), ids.get("padding")
        config.eos_token_id = end_tokens(ids)
    return header, config


def _rope_factors(header: Header) -> np.ndarray | None:
    """(head_dim / 2,) that divide RoPE's frequencies, if the file has them."""
    tensor = header.tensors.get(ROPE_FACTORS)
    return None if tensor is None else unpack(memoryview(header.data), ROPE_FACTORS, tensor)
