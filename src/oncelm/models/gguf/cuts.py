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
HAN = "[一-龥ࠀ-一가-퟿]+"
KANA = "[一-龥぀-ゟ゠-ヿ]+"
ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
DEEPSEEK3 = (
    rf"{ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)
DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    r"ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    r"𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
DIGITS, WORDS = "single digits", "GPT-2's words"  # steps that are no regular expressions


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
    **_named(
        Cut((r"[\r\n]", DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", HAN, DIGITS)), "deepseek-llm"
    ),
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
