"""What prompt lookup gives: tokens a step where an answer copies from its prompt, and where it does not.

    python benchmarks/engine_drafts.py results.jsonl

Whether a draft is right is a matter of the texts, not of the model: the answers here are given, and a draft is right if
the answer goes on so. `quotes` is passages of a book between new words, `edit` a file with two names replaced, `prose`
the book's next pages, `code` another file of the same package. Tokens are cl100k_base's.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import oncelm
from oncelm.data.corpora import iterate_corpus
from oncelm.data.tokenizers import load_tokenizer
from oncelm.engine.drafts import PromptLookup
from oncelm.utils.environment import environment_report


def write(prompt: list[int], answer: list[int], max_drafts: int) -> dict[str, float]:
    """Counts over the steps of writing `answer` behind `prompt`, and the seconds that drafting took."""
    lookup, whole, length = PromptLookup(), prompt + answer, len(prompt)
    steps = computed = drafted = 0
    seconds = []
    while length < len(whole):
        tokens = whole[:length]
        start = time.perf_counter()
        drafts = lookup.propose(tokens, min(max_drafts, len(whole) - length - 1))
        seconds.append(time.perf_counter() - start)
        right = next((i for i, draft in enumerate(drafts) if draft != whole[length + i]), len(drafts))
        length += right + 1
        steps, computed, drafted = steps + 1, computed + 1 + len(drafts), drafted + bool(drafts)
    return {
        "tokens_per_step": round(len(answer) / steps, 2),
        "computed_per_token": round(computed / len(answer), 2),
        "steps_with_drafts": round(drafted / steps, 2),
        "first_call_ms": round(1e3 * seconds[0], 2),
        "call_us": round(1e6 * sum(seconds[1:]) / len(seconds[1:]), 1),
    }


def texts() -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and answers."""
    tokenizer = load_tokenizer("cl100k_base")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    book = encode("".join(chapter.text for chapter in iterate_corpus("moby_dick")))
    cache = Path(oncelm.__file__).parent / "cache" / "yoco"
    file = (cache / "cache.py").read_text(encoding="utf-8")
    draw, quotes = random.Random(0), []
    for chapter in range(6):
        place = draw.randrange(20_000, 100_000)
        quotes += book[place : place + 60] + encode(f" And then, as chapter {chapter} tells us of such things, ")
    return {
        "quotes": (book[:120_000], quotes),
        "edit": (encode(file), encode(file.replace("store", "holder").replace("snapshot", "picture"))),
        "prose": (book[:120_000], book[150_000:152_000]),
        "code": (encode(file), encode((cache / "shared_kv.py").read_text(encoding="utf-8"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="the JSONL file to append to")
    args = parser.parse_args()
    environment = environment_report()
    for name, (prompt, answer) in texts().items():
        for max_drafts in (3, 7, 15):
            line = {"benchmark": "drafts", "answer": name, "max_drafts": max_drafts}
            line |= {"prompt_tokens": len(prompt), "answer_tokens": len(answer)}
            line |= write(prompt, answer, max_drafts)
            print(line, flush=True)
            with open(args.results, "a", encoding="utf-8") as results:
                results.write(json.dumps({**line, "environment": environment}) + "\n")


if __name__ == "__main__":
    main()
