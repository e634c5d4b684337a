"""Where a LLaMA copies from far back: which layers to give memory to (docs/longllama.md, "Which layers").

    python benchmarks/copying_heads.py MODEL                                          the layers, by their copying heads
    python benchmarks/copying_heads.py MODEL --mem-layers 8,16,24 17,18,20,23         and untrained memory in these
    python benchmarks/copying_heads.py MODEL --mem-layers 17,18 --choose 6            and the best four to add to them

A pass key stands in a short text that the model reads whole. Where a digit of the answer is predicted, a head that
copies attends to that digit in the text: its share of attention there, mean over digits and texts, is its score. Then,
in windows (--window) of a longer text (--repeats), the log-probability of the answer for each set of memory layers: of
the space before the key, with which an answer begins or does not, and of the digits. --choose adds, one at a time, the
layer that gives the answer most.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import oncelm
from oncelm.cli.options import layers as parse_layers
from oncelm.eval.tasks.passkey import FILLER, KEY, QUESTION, TASK
from oncelm.utils.environment import environment_report

TRIALS = (("27519", 0.1), ("40836", 0.5), ("9142", 0.75))  # pass key, and its place in the text
SHORT = 18  # repeats of the filler in the text that is read whole


def read_key(tokenizer, key: str, place: float, repeats: int) -> tuple[list[int], list[int], list[int]]:
    """Ids of a prompt and of the answer (most tokenizers: a space, then digits), and where its digits stand there."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    before, needle, digits = encode(FILLER) * int(repeats * place), encode(KEY.format(key=key)), encode(key)
    start = encode(TASK) + before
    prompt = start + needle + encode(FILLER) * (repeats - int(repeats * place)) + encode(QUESTION)
    found = [i for i in range(len(needle)) if needle[i : i + len(digits)] == digits]
    return prompt, encode(f" {key}"), [len(start) + i for i in found]


@torch.no_grad()
def score_heads(model, tokenizer) -> torch.Tensor:
    """[layers, heads]: attention to the digit that is predicted, where it stood before."""
    scores = []
    for key, place in TRIALS:
        prompt, answer, places = read_key(tokenizer, key, place, SHORT)
        attention = model(torch.tensor([prompt + answer]), output_attentions=True).attentions
        digits = len(tokenizer(key, add_special_tokens=False).input_ids)
        for i in range(digits):
            at, seen = len(prompt) + len(answer) - digits - 1 + i, [first + i for first in places]
            scores.append(torch.stack([layer[0, :, at, seen].sum(-1) for layer in attention]))
    return torch.stack(scores).mean(0)


@torch.no_grad()
def log_probability(folder: str, tokenizer, layers: list[int], window: int, repeats: int) -> dict[str, float]:
    """Nats of the answer's first token, of the likeliest token in its place, and of the rest, in windows; means."""
    model = oncelm.load(folder, "cpu", "float32", mem_layers=layers, max_position_embeddings=window)
    found = []
    for key, place in TRIALS:
        prompt, answer, _ = read_key(tokenizer, key, place, repeats)
        ids = torch.tensor([prompt + answer])
        wanted = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        logits = model(ids, logits_to_keep=wanted, last_context_length=window // 2, use_cache=False).logits[0]
        likely = logits.log_softmax(-1)
        nats = likely[torch.arange(len(answer)), answer]
        found.append([nats[0].item(), likely[0].max().item(), nats[1:].sum().item()])
    means = [round(sum(column) / len(found), 3) for column in zip(*found, strict=True)]
    return dict(zip(("first", "likeliest", "rest"), means, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mem-layers", nargs="+", default=[], metavar="I,J,...")
    parser.add_argument("--choose", type=int, metavar="N", help="add the best layers to each set, until it has N")
    parser.add_argument("--window", type=int, default=256, metavar="N", help="tokens (256)")
    parser.add_argument("--repeats", type=int, default=40, metavar="N", help="of the filler, 25 tokens each (40)")
    parser.add_argument("--out", metavar="FILE", help="append the lines to this file")
    args = parser.parse_args()
    tokenizer = oncelm.load_tokenizer(args.model)
    plain = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="eager", dtype=torch.float32).eval()
    name = Path(args.model).resolve().name
    common = {"benchmark": "copying_heads", "model": name, "environment": environment_report()}
    for layer, heads in enumerate(score_heads(plain, tokenizer)):
        report(
            args.out,
            {"layer": layer, "best_head": round(heads.max().item(), 3), "sum": round(heads.sum().item(), 3)},
            common,
        )

    def measure(layers: list[int]) -> float:
        found = log_probability(args.model, tokenizer, layers, args.window, args.repeats)
        line = {"mem_layers": layers, "window": args.window, "repeats": args.repeats, **found}
        report(args.out, line, common)
        return found["first"] + found["rest"]

    for named in args.mem_layers:
        layers = parse_layers(named)
        measure(layers)
        while args.choose is not None and len(layers) < args.choose:
            more = [sorted([*layers, i]) for i in range(plain.config.num_hidden_layers) if i not in layers]
            layers = max(more, key=measure)


def report(out: str | None, line: dict, common: dict) -> None:
    print(json.dumps(line), flush=True)
    if out is not None:
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps({**common, **line}) + "\n")


if __name__ == "__main__":
    main()
