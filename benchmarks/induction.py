"""How many steps until a small YOCO copies: strings of random tokens of which the end repeats what was before it.

    python benchmarks/induction.py benchmarks/results/cpu-induction.jsonl

What is learned here is induction: to find where the last token stood before, and what came behind it. Needles in a
haystack are found by nothing else. The loss counts the repeated tokens alone; `guessing` is log(number of tokens).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math

import torch
import torch.nn.functional as F

from oncelm.models import build_model
from oncelm.utils.environment import environment_report

LENGTH, ROWS, WIDTH = 32, 32, 128
LR, WARMUP_STEPS, STEPS, EVERY = 2e-3, 30, 300, 50


def curve(self_decoder: str, scale_embeddings: bool, vocab_size: int) -> dict[int, float]:
    """Steps done: loss of the repeated tokens, mean of the 20 steps before."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    model = build_model(
        "yoco-tiny",
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        self_decoder=self_decoder,
        window_size=LENGTH // 2,
        scale_embeddings=scale_embeddings,
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    losses, found = [], {}
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / WARMUP_STEPS)
        repeated = int(torch.randint(LENGTH // 4, LENGTH // 2, (), generator=random))
        tokens = torch.randint(4, vocab_size, (ROWS, LENGTH), generator=random)
        tokens[:, -repeated:] = tokens[:, -2 * repeated : -repeated]
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")  # [B, T - 1]
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss[:, 1 - repeated :].mean().item())
        if step % EVERY == 0:
            found[step] = math.fsum(losses[-20:]) / 20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="the JSONL file to append to")
    args = parser.parse_args()
    environment = environment_report()
    cases = [*itertools.product(("gated_retention", "sliding_window"), (True, False), (64,))]
    cases += [("gated_retention", False, vocab_size) for vocab_size in (256, 1024)]
    for self_decoder, scale, vocab_size in cases:
        line = {"benchmark": "induction", "self_decoder": self_decoder, "scale_embeddings": scale}
        line |= {"vocab_size": vocab_size, "guessing": round(math.log(vocab_size - 4), 3)}
        line |= {"width": WIDTH, "length": LENGTH, "tokens_per_step": ROWS * LENGTH, "lr": LR}
        found = curve(self_decoder, scale, vocab_size)
        line |= {"copy_loss": {str(step): round(loss, 3) for step, loss in found.items()}}
        print(line, flush=True)
        with open(args.results, "a", encoding="utf-8") as results:
            results.write(json.dumps({**line, "environment": environment}) + "\n")


if __name__ == "__main__":
    main()
