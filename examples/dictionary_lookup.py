"""The dictionary-lookup study of the Focused Transformer (arXiv 2307.03170), at toy scale on a CPU.

A document defines words and then asks for them:

    definitions   a b x   c d y   ...       two tokens of a word, one of its meaning
    questions     c d y   a b x   ...       only the meanings are targets

A small LongLLaMA is trained on documents of two contexts: definitions, then questions about them. Its one memory layer
sees the definitions of the own document (positive) and, by crossbatch, contexts of other documents (negatives), more of
them whenever training accuracy passes 98 %. Then questions are asked behind dictionaries of up to a million tokens.

    python examples/dictionary_lookup.py --minutes 8 --lengths 96,4096,65536,1048576 --out lookup.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from oncelm import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.cache import Snapshot

ENTRY = 3  # tokens: a word of two symbols and its meaning


@dataclass(frozen=True)
class Task:
    """`words` entries a context, of `symbols` different tokens: symbols ** 2 words there are."""

    words: int
    symbols: int

    @property
    def context(self) -> int:
        return ENTRY * self.words

    def entries(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """[count, ENTRY]: distinct words and their meanings."""
        codes = torch.randperm(self.symbols**2, generator=generator)[:count]
        meanings = torch.randint(0, self.symbols, (count,), generator=generator)
        return torch.stack((codes // self.symbols, codes % self.symbols, meanings), dim=1)

    def documents(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """[2 * count, context]: definitions and questions of one document after the other."""
        rows = []
        for _ in range(count):
            entries = self.entries(self.words, generator)
            rows += [entries.flatten(), entries[torch.randperm(self.words, generator=generator)].flatten()]
        return torch.stack(rows)


def make_model(task: Task, width: int, seed: int) -> LongLlamaForCausalLM:
    torch.manual_seed(seed)
    config = LongLlamaConfig(
        vocab_size=task.symbols,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=task.context,
        last_context_length=task.context,
        mem_layers=[2],
        mem_positionals=False,  # as the paper's small models
        mem_dtype=None,
        initializer_range=width**-0.5,  # 0.02 is for wide models: here training would stand still at first
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # contexts are short
    )
    return LongLlamaForCausalLM(config)


def train(model: LongLlamaForCausalLM, task: Task, minutes: float, rows: int, lr: float, seed: int) -> dict[str, float]:
    """Train with more and more negatives; returns what it took."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    is_meaning = torch.zeros(rows, task.context, dtype=torch.bool)
    is_meaning[1::2, ENTRY - 1 :: ENTRY] = True
    asks = is_meaning.roll(-1, dims=1)  # the logits before a meaning predict it
    contexts, step, smooth, started = 1, 0, 0.0, time.perf_counter()
    model.train()
    while time.perf_counter() - started < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100)
        tokens = task.documents(rows // 2, generator)
        logits = model(tokens, use_cache=False, cross_batch_range=contexts, logits_to_keep=asks).logits
        loss = torch.nn.functional.cross_entropy(logits, tokens[is_meaning])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        accuracy = (logits.argmax(-1) == tokens[is_meaning]).float().mean().item()
        smooth = 0.95 * smooth + 0.05 * accuracy
        if step % 100 == 0:
            print(f"step {step}: contexts {contexts}, loss {loss.item():.3f}, accuracy {smooth:.3f}", flush=True)
        if smooth > 0.98 and contexts < rows - 1:
            contexts, smooth = min(2 * contexts, rows - 1), 0.9
    seconds = time.perf_counter() - started
    return {"steps": step, "seconds": round(seconds), "contexts": contexts, "train_accuracy": round(smooth, 4)}


@torch.no_grad()
def lookup(model: LongLlamaForCausalLM, task: Task, length: int, seed: int, questions: int = 512) -> float:
    """Accuracy of questions about a dictionary of about `length` tokens in memory."""
    generator = torch.Generator().manual_seed(seed)
    entries = task.entries(max(1, length // task.context) * task.words, generator)
    cache = model.new_cache(1)
    cache.restore(read_dictionary(model, entries.flatten().view(-1, task.context)))
    right = asked = 0
    for part in torch.randperm(len(entries), generator=generator)[:questions].split(task.words):
        tokens = entries[part].flatten()[None]
        logits = model(tokens, past_key_values=cache).logits[0, ENTRY - 2 :: ENTRY]
        right += int((logits.argmax(-1) == tokens[0, ENTRY - 1 :: ENTRY]).sum())
        asked += len(part)
        cache.crop(tokens.shape[1])
    return right / asked


def read_dictionary(model: LongLlamaForCausalLM, windows: torch.Tensor) -> Snapshot:
    """A cache's state after `windows` [N, context], read one after the other.

    Keys and values of the first memory layer depend on the layers below it, which are local: windows can be read in
    parallel, as rows of a batch, and their memories put one behind the other. The result is the same.
    """
    parts = []
    for rows in windows.split(1024):
        cache = model.new_cache(len(rows))
        model(rows, past_key_values=cache, logits_to_keep=1)
        cache.spill()
        parts.append(cache.snapshot())
    tensors = dict(parts[0].tensors)
    for name, tensor in tensors.items():
        tensors[name] = tensor[:1]
        if "memory" in name:
            tensors[name] = torch.cat([part.tensors[name] for part in parts]).flatten(0, 1)[None]
    tensors["remembered"] = torch.tensor([windows.numel()])
    return Snapshot(tensors, (windows.numel(),), windows.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training (8)")
    parser.add_argument("--words", type=int, default=32, help="definitions in a document (32)")
    parser.add_argument("--symbols", type=int, default=640, help="tokens that words are made of (640)")
    parser.add_argument("--width", type=int, default=64, help="of the model (64)")
    parser.add_argument("--rows", type=int, default=16, help="contexts in a batch, two a document (16)")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", default="96,4096,65536,1048576", help="tokens of the dictionaries asked about")
    parser.add_argument("--out", help="a .jsonl file for the results")
    args = parser.parse_args()
    task = Task(args.words, args.symbols)
    model = make_model(task, args.width, args.seed)
    settings = {key: getattr(args, key) for key in ("words", "symbols", "width", "rows", "lr", "seed")}
    settings |= train(model, task, args.minutes, args.rows, args.lr, args.seed)
    model.eval()
    for length in map(int, args.lengths.split(",")):
        accuracy = lookup(model, task, length, seed=1)
        print(f"{length:>10,} tokens: {accuracy:.3f}", flush=True)
        if args.out:
            line = {"study": "dictionary lookup", "length": length, "accuracy": round(accuracy, 4)} | settings
            with Path(args.out).open("a") as stream:
                stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
