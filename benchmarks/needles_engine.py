"""Needle questions all at once on the engine, and one by one with `generate`: equal answers, and the seconds of each.

    python benchmarks/needles_engine.py MODEL --length 32K --out results.jsonl

MODEL is a folder that recipes/needles trained (any YOCO with its tokenizer will do, but finds nothing). Each of 8
haystacks, text of State of the Union, has 8 needles, and is asked for each of them. The engine gets the 64 prompts
together; of those that begin with one haystack, one reads it for all. `generate` reads each prompt anew. In float32
the greedy answers must be the same to the last token, or the script fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import oncelm
from oncelm.eval.codec import Codec
from oncelm.eval.documents import Haystack
from oncelm.eval.task import parse_tokens
from oncelm.eval.tasks.cities import CITIES
from oncelm.eval.tasks.needle import LARGEST_NUMBER, NEEDLE, QUESTION
from oncelm.utils.environment import environment_report


@dataclass(frozen=True)
class Question:
    """A prompt, and the number that answers it."""

    prompt: list[int]
    number: str

    def is_right(self, text: str) -> bool:
        """Whether the first number of an answer is the one asked for, whole."""
        first = re.search(r"\d+", text)
        return first is not None and first[0] == self.number


def make_questions(codec: Codec, haystacks: int, needles: int, length: int, source: str) -> list[Question]:
    """`needles` questions on each of `haystacks` texts of about `length` tokens; the needles stand at even depths."""
    text, found = Haystack(source, codec), []
    for number in range(haystacks):
        random = np.random.default_rng([number, length])
        cities = [CITIES[i] for i in random.permutation(len(CITIES))[:needles]]
        numbers = [str(value) for value in random.integers(1, LARGEST_NUMBER + 1, needles)]
        hidden = [codec.encode(NEEDLE.format(city=c, number=n)) for c, n in zip(cities, numbers, strict=True)]
        asked = [codec.encode(QUESTION.format(city=city)) for city in cities]
        room = length - len(codec.prefix) - sum(map(len, hidden)) - max(map(len, asked))
        if room < needles:
            raise ValueError(f"--length {length} has no room for {needles} needles; give at least {length - room}.")
        part = text.take(number * length, room)
        parts, at = [codec.prefix], 0
        for depth, needle in zip(np.linspace(0, 1, needles), hidden, strict=True):
            place = max(at, text.sentence_end(part, round(room * depth)))
            parts += [part[at:place], needle]
            at = place
        haystack = np.concatenate([*parts, part[at:]])
        found += [Question([*haystack.tolist(), *q.tolist()], n) for q, n in zip(asked, numbers, strict=True)]
    return found


def one_by_one(model: torch.nn.Module, questions: list[Question], max_tokens: int) -> list[list[int]]:
    """The ids that `generate` writes behind each prompt."""
    answers = []
    for question in tqdm(questions, desc="one by one", unit=" questions"):
        ids = torch.tensor([question.prompt], device=model.device)
        answers.append(model.generate(ids, max_new_tokens=max_tokens, do_sample=False)[0, ids.shape[1] :].tolist())
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="the folder of a model and its tokenizer")
    parser.add_argument("--length", type=parse_tokens, default=8192, metavar="T", help="tokens of a prompt (8K)")
    parser.add_argument("--haystacks", type=int, default=8, metavar="N", help="texts (8)")
    parser.add_argument("--needles", type=int, default=8, metavar="N", help="in each, and questions about it (8)")
    parser.add_argument("--max-tokens", type=int, default=10, metavar="N", help="of an answer (10)")
    parser.add_argument("--haystack", default="sotu", metavar="TEXT", help="text file or folder (sotu)")
    parser.add_argument("--device", help="cuda or cpu (a GPU where there is one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a line of results here")
    args = parser.parse_args()

    model = oncelm.load(args.model, args.device, dtype="float32").eval()
    tokenizer = oncelm.load_tokenizer(args.model)
    codec = Codec(tokenizer, model.config.vocab_size)
    questions = make_questions(codec, args.haystacks, args.needles, args.length, args.haystack)
    longest = max(len(question.prompt) for question in questions) + args.max_tokens

    llm = oncelm.LLM(model, tokenizer, max_model_len=longest, max_num_seqs=len(questions))
    params = oncelm.SamplingParams(temperature=0, max_tokens=args.max_tokens)
    start = time.perf_counter()
    outputs = llm.generate([question.prompt for question in questions], params)
    together = time.perf_counter() - start

    start = time.perf_counter()
    alone = one_by_one(model, questions, args.max_tokens)
    apart = time.perf_counter() - start

    answers = [output.outputs[0] for output in outputs]
    different = [i for i, (answer, ids) in enumerate(zip(answers, alone, strict=True)) if answer.token_ids != ids]
    right = [question.is_right(answer.text) for question, answer in zip(questions, answers, strict=True)]
    line = {
        "benchmark": "needles_engine",
        "model": Path(args.model).resolve().name,
        "parameters": model.num_parameters(),
        "device": str(model.device),
        "dtype": "float32",
        "haystacks": args.haystacks,
        "needles": args.needles,
        "length": args.length,
        "prompt_tokens": sum(len(question.prompt) for question in questions),
        "cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "hits": sum(output.num_cached_tokens > 0 for output in outputs),
        "equal_answers": len(questions) - len(different),
        "questions": len(questions),
        "right": sum(right) / len(right),
        "seconds_together": round(together, 3),
        "seconds_one_by_one": round(apart, 3),
        "environment": environment_report(),
    }
    print(json.dumps({key: value for key, value in line.items() if key != "environment"}, indent=2))
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if different:
        shown = [(i, answers[i].token_ids, alone[i]) for i in different[:5]]
        sys.exit(f"{len(different)} answers differ from those of generate (number, together, alone): {shown}")


if __name__ == "__main__":
    main()
