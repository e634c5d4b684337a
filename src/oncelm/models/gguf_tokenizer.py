"""The tokenizer that a GGUF file holds, as a Hugging Face fast tokenizer.

It is built from the file's own lists: tokens, merges or scores, and the name of the cut into words.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oncelm.models.gguf_words import WORDS, Words
from oncelm.utils.errors import check_choice

logger = logging.getLogger(__name__)

MODEL, CUT, TOKENS, TYPES = (f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type"))
MERGES, SCORES = "tokenizer.ggml.merges", "tokenizer.ggml.scores"
ADD_BOS, ADD_EOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
ADD_SPACE, STRIP_SPACES = "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces"
TEMPLATE = "tokenizer.chat_template"
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
UNKNOWN_TOKEN, CONTROL_TOKEN, USER_TOKEN = 2, 3, 4  # of the token types
SPACE = "\u2581"  # what stands for a space in sentencepiece's tokens

LISTS = (TOKENS, TYPES, MERGES, SCORES)
KNOWN = (MODEL, CUT, ADD_BOS, ADD_EOS, ADD_SPACE, STRIP_SPACES, *LISTS, "tokenizer.ggml.add_sep_token")
KNOWN_PREFIXES = ("tokenizer.chat_template", "tokenizer.huggingface")


def check_tokenizer(path: str | os.PathLike[str], fields: Mapping[str, Any], tokens: int, rows: int) -> None:
    """Refuse what cannot be honoured, before any long list is read.

    Args:
        fields: the metadata, without the lists of tokens.
        tokens: how many the file lists.
        rows: of the embedding.
    """
    for name, value in fields.items():
        if name.startswith("tokenizer.") and name.endswith("_token_id"):
            if not isinstance(value, int) or not 0 <= value < tokens:
                raise ValueError(f"{path} has {name} {value!r}, and {tokens} tokens: allowed is 0 to {tokens - 1}.")
        elif name.startswith("tokenizer.") and name not in KNOWN and not name.startswith(KNOWN_PREFIXES):
            raise ValueError(f"{path} has {name}, which is not known here.")
    check_choice(MODEL, fields.get(MODEL), ("llama", "gpt2"))
    for name in (ADD_BOS, ADD_EOS, ADD_SPACE, STRIP_SPACES, "tokenizer.ggml.add_sep_token"):
        if not isinstance(fields.get(name, False), bool):
            raise ValueError(f"{path} has {name} {fields[name]!r}; allowed: true, false.")
    refused = [STRIP_SPACES, "tokenizer.ggml.add_sep_token"]
    if fields[MODEL] == "gpt2":
        refused.append(ADD_SPACE)
        if fields.get(CUT, "default") != "default":
            check_choice(CUT, fields[CUT], WORDS)
    for name in refused:
        if fields.get(name):
            raise ValueError(f"{path} has {name} true, which tokenizers of model {fields[MODEL]!r} here do not do.")
    for name, key in (("bos", ADD_BOS), ("eos", ADD_EOS)):
        if fields.get(key) and f"tokenizer.ggml.{name}_token_id" not in fields:
            raise ValueError(f"{path} has {key} true, and no tokenizer.ggml.{name}_token_id.")
    if not tokens or tokens > rows:
        raise ValueError(f"{path} lists {tokens} tokens in {TOKENS}, and its embedding has {rows} rows.")


def read_tokenizer(
    path: str | os.PathLike[str], fields: Mapping[str, Any], lists: Mapping[str, list[Any]]
) -> PreTrainedTokenizerFast:
    """The tokenizer, with its special tokens and its chat template.

    Args:
        fields: the metadata, checked by `check_tokenizer`.
        lists: those of `LISTS` that the file has.
    """
    tokens, types = lists[TOKENS], lists.get(TYPES, [])
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ValueError(f"{path} lists the token {twice!r} twice in {TOKENS}.")
    for name in (TYPES, SCORES):
        if len(lists.get(name, tokens)) != len(tokens):
            raise ValueError(f"{path} has {len(lists[name])} entries in {name} and {len(tokens)} in {TOKENS}.")
    special = {name: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in SPECIAL_TOKENS if _has(fields, name)}
    if fields[MODEL] == "gpt2":
        words = _words(path, fields)
        backend, add_bos = _byte_level(vocab, _merges(path, lists, vocab), words), words.add_bos
    else:
        merges = _merges(path, lists, vocab) if MERGES in lists else _merges_of_scores(path, lists, vocab)
        backend = _sentencepiece(vocab, merges, special.get("unknown"), fields.get(ADD_SPACE, True))
        add_bos = True
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != USER_TOKEN)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (UNKNOWN_TOKEN, CONTROL_TOKEN, USER_TOKEN)
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        add_bos_token=fields.get(ADD_BOS, add_bos and "bos" in special),
        add_eos_token=fields.get(ADD_EOS, False),
        model_input_names=["input_ids", "attention_mask"],
        **{SPECIAL_TOKENS[name]: token for name, token in special.items()},
    )
    tokenizer.chat_template = fields.get(TEMPLATE)
    return tokenizer


def end_tokens(fields: Mapping[str, Any]) -> list[int]:
    """The ids that end a text: of the text, of a turn, of a message."""
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(fields[name]) for name in names if name in fields))


def _has(fields: Mapping[str, Any], name: str) -> bool:
    return f"tokenizer.ggml.{name}_token_id" in fields


def _words(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> Words:
    cut = fields.get(CUT, "default")
    if cut == "default":
        logger.warning("%s does not name the cut of its text (%s): it is cut as for GPT-2.", path, CUT)
        cut = "gpt-2"
    return WORDS[cut]


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], words: Words) -> Tokenizer:
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=words.whole_words))
    if words.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(words.steps))
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None, add_space: bool
) -> Tokenizer:
    """Whole texts, with `SPACE` for spaces; what is not in the vocabulary becomes its bytes."""
    backend = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        spaces.insert(0, normalizers.Prepend(SPACE))
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(
    path: str | os.PathLike[str], lists: Mapping[str, list[str]], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The pairs of `tokenizer.ggml.merges`, in order; each line is two tokens with a space between."""
    if MERGES not in lists:
        raise ValueError(f"{path} has no {MERGES}.")
    merges = []
    for line in lists[MERGES]:
        left, _, right = line.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ValueError(f"{path} has the merge {line!r} of tokens that it does not list.")
        merges.append((left, right))
    return merges


def _merges_of_scores(
    path: str | os.PathLike[str], lists: Mapping[str, Sequence[Any]], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """All pairs that make up a token, the token of the highest score first; so sentencepiece merges."""
    if SCORES not in lists:
        raise ValueError(f"{path} has neither {MERGES} nor {SCORES}.")
    pairs = []
    for token, score in zip(lists[TOKENS], lists[SCORES], strict=True):
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in vocab and right in vocab]
        pairs += [(-score, vocab[left], vocab[right], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(pairs, key=lambda pair: pair[0:3])]
