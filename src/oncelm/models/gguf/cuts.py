r"""How a byte-level tokenizer cuts text before any merge, by the names in `tokenizer.ggml.pre`.

A name stands for the pre-tokenizer of the model that it was given to. Here each is written as the steps of that model's
own `tokenizer.json`: a cut at a regular expression (Oniguruma's), single digits, GPT-2's words. Names whose original is
not known here are missing, and refused.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from oncelm.utils.errors import check_choice

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r" ?[^\s\p{L}\p{N}]+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"

LLAMA3 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{SIGNS}[\r\n]*|{SPACES}"
QWEN2 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{SIGNS}[\r\n]*|{SPACES}"
SEED_CODER = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}"
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{SIGNS}[\r\n/]*|{SPACES}"
GPT4O = rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{SIGNS}[\r\n/]*|{SPACES}"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
DEEPSEEK3 = (
    rf"{ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)
LETTER_RANGES = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 "
    "1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE "
    "1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 "
    "2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A "
    "10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943 "
)  # DeepSeek LLM's, by code point: many of them look like others
CJK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
DIGITS, WORDS = "single digits", "GPT-2's words"  # steps that are no regular expressions


def _characters(ranges: str) -> str:
    """What stands between the brackets of a character class, from code points in hexadecimal.

    >>> _characters("41-5A B5")
    'A-Zµ'
    """
    return "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in ranges.split())


DEEPSEEK_LETTERS = rf"\s?[{_characters(LETTER_RANGES)}]+"


class Cut(NamedTuple):
    steps: tuple[str, ...]
    whole_words: bool = False  # a word that is in the vocabulary is taken as it is, whatever the merges say
    starts: bool = False  # texts begin with the bos token where the file does not say
    composed: bool = False  # text is brought to Unicode's NFC first

    def pre_tokenizer(self) -> PreTokenizer:
        steps: list[PreTokenizer] = []
        for step in self.steps:
            if step == DIGITS:
                steps.append(pre_tokenizers.Digits(individual_digits=True))
            elif step != WORDS:
                steps.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=WORDS in self.steps)
        return pre_tokenizers.Sequence([*steps, to_bytes])

    def normalizer(self) -> Normalizer | None:
        return normalizers.NFC() if self.composed else None


def _named(cut: Cut, names: str) -> dict[str, Cut]:
    return dict.fromkeys(names.split(), cut)


CUTS = {
    **_named(Cut((LLAMA3,), whole_words=True, starts=True), "llama3 llama-v3 llama-bpe falcon3 pixtral midm-2.0 lfm2"),
    **_named(Cut((LLAMA3,)), "smaug-bpe dbrx glm4 chatglm-bpe"),
    **_named(Cut((TEKKEN,), whole_words=True, starts=True), "tekken"),
    **_named(Cut((GPT4O,)), "gpt-4o llama4"),
    **_named(Cut((QWEN2,), composed=True), "qwen2 stablelm2"),
    **_named(Cut((SEED_CODER,)), "seed-coder"),
    **_named(Cut((BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
    **_named(Cut((WORDS,)), "gpt-2 phi-2 trillion mellum"),
    **_named(Cut((DIGITS, WORDS)), "smollm starcoder refact codeshell minerva-7b"),
    **_named(Cut((BLOOM,)), "bloom poro-chat gpt3-finnish"),
    **_named(Cut((BLOOM, DIGITS)), "viking"),
    **_named(Cut((r"\p{N}{1,3}", KANA, DEEPSEEK3)), "deepseek-v3"),
    **_named(Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, DIGITS)), "deepseek-coder"),
    **_named(Cut((r"[\r\n]", DEEPSEEK_LETTERS, CJK_SIGNS, r"\s+$", HAN, DIGITS)), "deepseek-llm"),
}


def find_cut(name: object) -> Cut:
    """The cut of that name.

    Raises:
        ValueError: no name, or one that is not known here, with the list of those that are.
    """
    if name in (None, "default"):
        raise ValueError("tokenizer.ggml.pre does not say how text is cut into words; make the file anew.")
    check_choice("tokenizer.ggml.pre", name, CUTS)
    return CUTS[str(name)]
