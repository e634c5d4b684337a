"""The tokenizer that a GGUF file describes, as a Hugging Face fast tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from oncelm.models.gguf.cuts import find_cut
from oncelm.models.gguf.header import short
from oncelm.utils.errors import check_choice

logger = logging.getLogger(__name__)

KEYS = "tokenizer.ggml."
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
MODELS = ("gpt2", "llama")  # byte-level BPE; sentencepiece's BPE
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of tokens
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # where a file does not say
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message
# What no tokenizer here does, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    f"{KEYS}remove_extra_whitespaces": (False,),
    f"{KEYS}add_sep_token": (False,),
    f"{KEYS}normalizer.lowercase": (False,),
    f"{KEYS}normalizer.strip_accents": (False,),
    f"{KEYS}token_type_count": (1,),
}
READ = {
    *(KEYS + name for name in ("model", "pre", "tokens", "scores", "token_type", "merges")),
    *(KEYS + name for name in ("add_space_prefix", "add_bos_token", "add_eos_token")),
    *NEUTRAL,
}
ID = "_token_id"


def read_tokenizer(path: Path, metadata: dict[str, Any], vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer with its special tokens and chat templates.

    Args:
        path: named in errors.
        metadata: of the file.
        vocab_size: the rows of the embedding; every token's id must be below.

    Raises:
        ValueError: a kind of tokenizer, a cut of words or an option that is not known here, or damaged lists.
    """
    kind = metadata.get(f"{KEYS}model")
    check_choice(f"{KEYS}model", kind, MODELS)
    _check_keys(path, metadata)
    tokens, kinds = _tokens(path, metadata, vocab_size)
    ids = special_ids(metadata)
    _check_ids(path, ids, len(tokens))
    named = {name: tokens[ids[key]] for key, name in SPECIAL.items() if key in ids}
    if kind == "gpt2":
        tokenizer, starts = _byte_level(path, metadata, tokens)
    else:
        tokenizer, starts = _sentencepiece(path, metadata, tokens, named.get("unk_token")), True
    special = [token for token, of in zip(tokens, kinds, strict=True) if of in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    whole = [token for token, of in zip(tokens, kinds, strict=True) if of == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        add_bos_token=_adds(path, metadata, "bos", starts and "bos" in ids, ids),
        add_eos_token=_adds(path, metadata, "eos", False, ids),
        chat_template=_templates(path, metadata),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids of tokens with a part to play, by the part: bos, eos, eot, ..."""
    named = {
        key.removeprefix(KEYS).removesuffix(ID): value
        for key, value in metadata.items()
        if key.startswith(KEYS) and key.endswith(ID)
    }
    return (SENTENCEPIECE_IDS if metadata.get(f"{KEYS}model") == "llama" else {}) | named


def end_tokens(ids: dict[str, int]) -> int | list[int] | None:
    """The ids at which an answer ends."""
    ends = list(dict.fromkeys(ids[name] for name in ENDS if name in ids))
    return ends[0] if len(ends) == 1 else ends or None


def _check_keys(path: Path, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        if not key.startswith(KEYS) or key.endswith(ID):
            continue
        if key not in READ or (key in NEUTRAL and not (isinstance(value, int) and value in NEUTRAL[key])):
            raise ValueError(f"{path} has {key} {short(value)}, which the converted tokenizer would not honour.")
    others = [key for key in metadata if key.startswith("tokenizer.") and not key.startswith((KEYS, TEMPLATE))]
    if others:
        logger.warning("%s: not read: %s.", path, ", ".join(others))


def _check_ids(path: Path, ids: dict[str, Any], count: int) -> None:
    for name, value in ids.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise ValueError(
                f"{path} has {KEYS}{name}{ID} {short(value)}: its {count:,} tokens are 0 to {count - 1:,}."
            )


def _adds(path: Path, metadata: dict[str, Any], name: str, default: bool, ids: dict[str, int]) -> bool:
    """Whether every text gets that token."""
    key = f"{KEYS}add_{name}_token"
    value = metadata.get(key, default)
    if not isinstance(value, bool) or (value and name not in ids):
        raise ValueError(f"{path} has {key} {short(value)}, and {KEYS}{name}{ID} {ids.get(name)!r}.")
    return bool(value)


def _tokens(path: Path, metadata: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The tokens by id, each once, and the kind of each."""
    tokens = metadata.get(f"{KEYS}tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= vocab_size:
        raise ValueError(
            f"{path} has {len(tokens) if isinstance(tokens, list) else 'no'} {KEYS}tokens; "
            f"its token_embd.weight is of {vocab_size:,}."
        )
    if len(ids := dict(zip(tokens, range(len(tokens)), strict=True))) < len(tokens):
        first, token = next((index, token) for index, token in enumerate(tokens) if ids[token] != index)
        raise ValueError(f"{path} has {KEYS}tokens with {token!r} twice, as ids {first} and {ids[token]}.")
    kinds = _numbers(path, metadata, "token_type", len(tokens))
    return tokens, [1] * len(tokens) if kinds is None else [int(kind) for kind in kinds]


def _numbers(path: Path, metadata: dict[str, Any], name: str, count: int) -> np.ndarray | None:
    """A list of numbers, one a token."""
    values = metadata.get(KEYS + name)
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise ValueError(f"{path} has {KEYS}{name} that are not {count:,} numbers, one for each token.")
    return values


def _merges(path: Path, metadata: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Pairs to be joined, the first ones first; None where the file has none."""
    lines = metadata.get(f"{KEYS}merges")
    if lines is None:
        return None
    pairs = [_pair(line) for line in lines] if isinstance(lines, list) else [None]
    if None in pairs:
        raise ValueError(f"{path} has {KEYS}merges that are not pairs of tokens with a space between.")
    return [pair for pair in pairs if pair]


def _pair(line: str) -> tuple[str, str] | None:
    space = line.find(" ", 1)  # a first token may begin with one
    return (line[:space], line[space + 1 :]) if 0 < space < len(line) - 1 else None


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """BPE of words of UTF-8 bytes, and whether such texts begin with the bos token where the file does not say."""
    cut = find_cut(metadata.get(f"{KEYS}pre"))
    merges = _merges(path, metadata)
    if merges is None:
        raise ValueError(f"{path} has no {KEYS}merges.")
    if metadata.get(f"{KEYS}add_space_prefix"):
        raise ValueError(f"{path} has {KEYS}add_space_prefix True, which only sentencepiece tokenizers ('llama') do.")
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=cut.whole_words))
    tokenizer.normalizer = cut.normalizer()
    tokenizer.pre_tokenizer = cut.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.starts


def _sentencepiece(path: Path, metadata: dict[str, Any], tokens: list[str], unknown: str | None) -> Tokenizer:
    """BPE over a whole text whose spaces are written as ▁, with single bytes for what is no token."""
    pre = metadata.get(f"{KEYS}pre", "default")
    check_choice(f"{KEYS}pre of {KEYS}model 'llama'", pre, ("default",))
    merges = _merges(path, metadata)
    if merges is None:
        scores = _numbers(path, metadata, "scores", len(tokens))
        if scores is None:
            raise ValueError(f"{path} has neither {KEYS}scores nor {KEYS}merges.")
        merges = list(_merges_by_score(tokens, scores))
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space_first = bool(metadata.get(f"{KEYS}add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_first else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_first else steps)
    return tokenizer


def _merges_by_score(tokens: list[str], scores: np.ndarray) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that is a token, by the falling score of the whole: what sentencepiece joins first."""
    vocab = {token: index for index, token in enumerate(tokens)}
    for whole in np.argsort(-scores, kind="stable").tolist():
        token = tokens[whole]
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        yield from sorted(
            (pair for pair in pairs if pair[0] in vocab and pair[1] in vocab),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )


def _templates(path: Path, metadata: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or all of them by name where there are several."""
    default = metadata.get(TEMPLATE)
    named = {
        key.removeprefix(f"{TEMPLATE}."): value for key, value in metadata.items() if key.startswith(f"{TEMPLATE}.")
    }
    if not all(isinstance(template, str) for template in (default or "", *named.values())):
        raise ValueError(f"{path} has a {TEMPLATE} that is no text.")
    if not named:
        return default
    return ({"default": default} if default else {}) | named
