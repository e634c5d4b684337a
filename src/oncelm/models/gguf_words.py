"""How a text is cut into words before the merges of byte-level BPE, by the names of GGUF files.

`tokenizer.ggml.pre` names one of the ways that llama.cpp knows. The steps here are those of the Hugging Face tokenizers
that such files are made from: a word is never merged with the next one, so another cut gives other ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Split

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WHITE_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UP_TO_THREE_DIGITS = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WHITE_SPACE  # as of Llama 3
)
ONE_DIGIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WHITE_SPACE
ONE_DIGIT_NO_NEWLINE = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + WHITE_SPACE

# Words that change from lower to upper case in the middle are cut there.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{MARKS}|{WHITE_SPACE}"
GPT_4O = (
    rf"{BEFORE}{UPPER}*{LOWER}+{CONTRACTIONS}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{MARKS}|{WHITE_SPACE}"
)

DEEPSEEK_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    r"]+"
)
DEEPSEEK_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
DEEPSEEK_3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + WHITE_SPACE
)
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


@dataclass(frozen=True)
class Words:
    """One way to cut."""

    steps: tuple[PreTokenizer, ...]
    nfc: bool = False  # whether the text is brought to Unicode's composed form first
    whole_words: bool = False  # whether a word that is in the vocabulary is one token, whatever the merges say
    add_bos: bool = False  # whether texts start with the bos token where the file does not say


def split(*patterns: str) -> tuple[PreTokenizer, ...]:
    """One cut after the other, each around what its regular expression matches."""
    return tuple(Split(Regex(pattern), behavior="isolated") for pattern in patterns)


TO_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2 = ByteLevel(add_prefix_space=False, use_regex=True)
SINGLE_DIGITS = Digits(individual_digits=True)

LLAMA_3 = Words((*split(UP_TO_THREE_DIGITS), TO_BYTES), whole_words=True, add_bos=True)
QWEN_2 = Words((*split(ONE_DIGIT), TO_BYTES), nfc=True)
STARCODER = Words((SINGLE_DIGITS, GPT_2))
FALCON_STEPS = (Punctuation("contiguous"), GPT_2, Digits(individual_digits=False), *split("[0-9][0-9][0-9]"))
DEEPSEEK_LLM_STEPS = (
    *split("[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_MARKS, r"\s+$", DEEPSEEK_EAST_ASIAN),
    SINGLE_DIGITS,
    TO_BYTES,
)
DEEPSEEK_CODER_STEPS = (*split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_EAST_ASIAN), SINGLE_DIGITS, TO_BYTES)

WORDS = {
    "llama-bpe": LLAMA_3,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
    "smaug-bpe": Words(LLAMA_3.steps),
    "dbrx": Words(LLAMA_3.steps),
    "tekken": Words((*split(TEKKEN), TO_BYTES), whole_words=True, add_bos=True),
    "gpt-4o": Words((*split(GPT_4O), TO_BYTES)),
    "llama4": Words((*split(GPT_4O), TO_BYTES)),
    "qwen2": QWEN_2,
    "stablelm2": QWEN_2,
    "seed-coder": Words((*split(ONE_DIGIT_NO_NEWLINE), TO_BYTES)),
    "deepseek-llm": Words(DEEPSEEK_LLM_STEPS),
    "deepseek-coder": Words(DEEPSEEK_CODER_STEPS),
    "deepseek-v3": Words((*split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_3), TO_BYTES)),
    "falcon": Words(FALCON_STEPS),
    "starcoder": STARCODER,
    "refact": STARCODER,
    "smollm": STARCODER,
    "codeshell": STARCODER,
    "exaone": STARCODER,
    "command-r": Words(STARCODER.steps, nfc=True),
    "gpt-2": Words((GPT_2,)),
    "phi-2": Words((GPT_2,)),
    "jais": Words((GPT_2,)),
    "trillion": Words((GPT_2,)),
    "mpt": Words((GPT_2,), nfc=True),
    "olmo": Words((GPT_2,), nfc=True),
    "bloom": Words((*split(BLOOM), TO_BYTES)),
    "poro-chat": Words((*split(BLOOM), TO_BYTES)),
    "gpt3-finnish": Words((*split(BLOOM), TO_BYTES)),
    "viking": Words((*split(BLOOM), SINGLE_DIGITS, TO_BYTES)),
}
