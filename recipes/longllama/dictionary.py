"""The dictionary-lookup study of the Focused Transformer (arXiv 2307.03170): trained at 512 tokens, asked at a million.

    python recipes/longllama/dictionary.py --out lookup                                    15 minutes on a CPU
    python recipes/longllama/dictionary.py --out lookup --contexts 128 --rows 256          on a GPU: the paper's range

A document is two contexts, definitions and then questions:

    a b c x   d e f y   ...       three symbols of a word, one of its meaning
    d e f y   a b c x   ...       the same words in another order; the meanings are to be predicted

A small LongLLaMA has one memory layer. It sees the definitions of its own document (positive) and, by crossbatch,
contexts of other documents (negatives): more of them whenever training accuracy passes 98 %, as in the paper. Before
that, documents grow from two words to a whole context: from a whole one at once, nothing is learned for long.

Then questions are asked with dictionaries of up to a million tokens in memory. OUT gets lookup.jsonl (a line a length)
and lookup.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from oncelm import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.cache import Snapshot
from oncelm.ops.crossbatch import earlier_contexts
from oncelm.utils.device import resolve_device
from oncelm.utils.environment import environment_report

ENTRY = 4  # tokens: a word of three symbols and its meaning
WORDS = 128  # in a context of 512 tokens
SYMBOLS, MEANINGS = 80, 64  # 512,000 words: dictionaries of up to two million tokens without a word twice
WIDTH, HEADS, LAYERS, MEMORY_LAYER = 128, 4, 3, 1
LEARNED, SURE = 0.95, 0.98  # training accuracy at which documents grow, and at which contexts are added


@dataclass(frozen=True)
class Training:
    """What it took, and how far it came."""

    steps: int
    seconds: float
    contexts: int
    train_accuracy: float


def make_model(device: torch.device, seed: int) -> LongLlamaForCausalLM:
    torch.manual_seed(seed)
    config = LongLlamaConfig(
        vocab_size=SYMBOLS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=ENTRY * WORDS,
        last_context_length=ENTRY * WORDS,
        mem_layers=[MEMORY_LAYER],
        mem_positionals=False,  # as the paper's small models
        mem_dtype=None,
        tie_word_embeddings=True,  # what is found can be said without learning how
        initializer_range=WIDTH**-0.5,  # 0.02 is for wide models: here training would stand still at first
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},  # what is local here is three tokens away
    )
    return LongLlamaForCausalLM(config).to(device)


def entries(codes: torch.Tensor, alphabet: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """codes [..., n], numbers of words -> [..., n, ENTRY]: symbols of `alphabet`, and a meaning drawn for each."""
    symbols = [alphabet[codes // len(alphabet) ** i % len(alphabet)] for i in range(ENTRY - 1)]
    return torch.stack([*symbols, torch.randint(MEANINGS, codes.shape, generator=generator)], dim=-1)


def documents(count: int, words: int, generator: torch.Generator) -> torch.Tensor:
    """[2 * count, ENTRY * words]: definitions and questions of one document after the other; no word is in two of them.

    Every other batch of whole contexts (at random) takes so few symbols that most words that can be made of them occur:
    among a million tokens a word has many neighbours that differ in one symbol, among a batch's it has them only so.
    """
    size = SYMBOLS
    if words == WORDS and torch.rand((), generator=generator) < 0.5:
        size = math.ceil((2 * count * words) ** (1 / (ENTRY - 1)))
    alphabet = torch.randperm(SYMBOLS, generator=generator)[:size]
    codes = torch.randperm(size ** (ENTRY - 1), generator=generator)[: count * words].view(count, words)
    definitions = entries(codes, alphabet, generator)
    order = torch.rand(count, words, generator=generator).argsort(1)
    questions = definitions.gather(1, order[..., None].expand_as(definitions))
    return torch.stack((definitions, questions), dim=1).flatten(0, 1).flatten(1)


def train(model: LongLlamaForCausalLM, args: argparse.Namespace) -> Training:
    """Longer documents first, then more and more contexts of others; the learning rate falls over the last half."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    words, contexts, accuracy, started = 2, 1, 0.0, time.perf_counter()
    model.train()
    for step in itertools.count():
        share = (time.perf_counter() - started) / (60 * args.minutes)
        if share >= 1:
            return Training(step, round(time.perf_counter() - started), contexts, round(accuracy, 4))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100, 2 * (1 - share))
        tokens = documents(max(args.rows // 2, 192 // words), words, generator).to(model.device)
        rows = len(tokens)
        asks = torch.zeros_like(tokens, dtype=torch.bool)
        asks[1::2, ENTRY - 2 :: ENTRY] = True  # the logits before a meaning predict it
        # the questions see the definitions before them and what lies before those; definitions see nothing
        output = model(
            tokens,
            use_cache=False,
            cross_batch_range=contexts,
            cross_batch_stepping=True,
            dataset_packing=2,
            logits_to_keep=asks,
        )
        targets = tokens[asks.roll(1, dims=1)]
        loss = F.cross_entropy(output.logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        accuracy += 0.05 * ((output.logits.argmax(-1) == targets).float().mean().item() - accuracy)
        if step % 100 == 99:
            seen = max(earlier_contexts(rows, contexts, True, 2))
            print(
                f"{share:4.0%}  step {step + 1:5}  words {words:3}  contexts {seen:3}  loss {loss.item():.3f}  "
                f"accuracy {accuracy:.3f}",
                flush=True,
            )
        if words < WORDS and accuracy > LEARNED:
            words, accuracy = 2 * words, 0.8
        elif words == WORDS and contexts < args.contexts and accuracy > SURE:
            contexts, accuracy = min(2 * contexts, args.contexts), 0.9


@torch.no_grad()
def lookup(model: LongLlamaForCausalLM, tokens: int, questions: int, seed: int) -> float:
    """Accuracy of questions with a dictionary of `tokens` in memory, rounded down to whole contexts."""
    generator = torch.Generator().manual_seed(seed)
    count = tokens // (ENTRY * WORDS) * WORDS
    codes = torch.randperm(SYMBOLS ** (ENTRY - 1), generator=generator)[:count]
    known = entries(codes, torch.arange(SYMBOLS), generator)
    cache = model.new_cache(1)
    cache.restore(read(model, known.flatten().view(-1, ENTRY * WORDS).to(model.device)))
    right = 0
    asked = torch.randperm(count, generator=generator)[:questions]
    for part in asked.split(WORDS):
        ids = known[part].flatten()[None].to(model.device)
        logits = model(ids, past_key_values=cache).logits[0, ENTRY - 2 :: ENTRY]
        right += int((logits.argmax(-1) == ids[0, ENTRY - 1 :: ENTRY]).sum())
        cache.crop(ids.shape[1])
    return right / len(asked)


@torch.no_grad()
def read(model: LongLlamaForCausalLM, windows: torch.Tensor) -> Snapshot:
    """A cache's state behind `windows` [N, T], read one after the other.

    Keys and values of the first memory layer depend on the layers below it, which are local: the windows can be read in
    parallel, as rows of a batch, and their memories put one behind the other. The result is the same.
    """
    parts = []
    for rows in windows.split(64):
        cache = model.new_cache(len(rows))
        model(rows, past_key_values=cache, logits_to_keep=1)
        cache.spill()
        parts.append(cache.snapshot())
    tensors = {name: tensor[:1] for name, tensor in parts[0].tensors.items()}
    for name in tensors:
        if "memory" in name:
            tensors[name] = torch.cat([part.tensors[name] for part in parts]).flatten(0, 1)[None]
    count = windows.numel()
    tensors["remembered"] = torch.full_like(tensors["remembered"], count)
    return Snapshot(tensors, (count,), count)


def plot(lines: list[dict], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["tokens"] for line in lines], [line["accuracy"] for line in lines], marker="o")
    axes.axvline(ENTRY * WORDS, linestyle=":", color="gray", label="context in training")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="tokens in memory", ylabel="accuracy", title="dictionary lookup")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0, help="of training (15)")
    parser.add_argument("--contexts", type=int, default=15, help="that a question sees at most in training (15)")
    parser.add_argument("--rows", type=int, default=16, help="contexts in a batch, two a document (16)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", default="512,4096,32768,262144,1048576", help="tokens of the dictionaries asked")
    parser.add_argument("--questions", type=int, default=512, help="asked at each length (512)")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    args = parser.parse_args()
    device = resolve_device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 is enough here, and several times faster
    model = make_model(device, args.seed)
    trained = train(model, args)
    model.eval()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for tokens in map(int, args.lengths.split(",")):
        accuracy = lookup(model, tokens, args.questions, seed=args.seed + 1)
        print(f"{tokens:>10,} tokens: {accuracy:.3f}", flush=True)
        lines.append({"study": "dictionary lookup", "tokens": tokens, "accuracy": round(accuracy, 4)})
    shared = {"rows": args.rows, "lr": args.lr, "seed": args.seed, "questions": args.questions, **asdict(trained)}
    shared["environment"] = environment_report()
    (args.out / "lookup.jsonl").write_text("".join(json.dumps(line | shared) + "\n" for line in lines))
    model.save_pretrained(args.out / "model")
    plot(lines, args.out / "lookup.png")


if __name__ == "__main__":
    main()
