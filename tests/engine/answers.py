"""Tiny models whose answers depend on all that came before, and what `model.generate` answers to each prompt alone."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import cache

import torch

from oncelm import YocoForCausalLM
from tests.models.small import KINDS, VOCAB, make_model

LONGEST = 20  # tokens of an answer
DOUBTFUL = 1e-5  # a gap between the two likeliest tokens, relative to the largest logit, that rounding may close
EOS = 2
NAMES = (*KINDS, "retention-float64", "window-float64")


@cache
def tiny_model(name: str) -> YocoForCausalLM:
    """A model of two layers or more. Weights where tokens meet are large: what a model of small ones writes follows
    from the last token alone, and a lost state would not show."""
    kind = name.removesuffix("-float64")
    halves = {}
    if "layer_types" not in KINDS[kind] and "layout" not in KINDS[kind]:
        own, cross = 0 if kind == "cross-only" else 2, 0 if kind == "retention-only" else 1
        halves = {"num_self_decoder_layers": own, "num_cross_decoder_layers": cross}
    model = make_model(
        kind, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, **halves
    )
    torch.manual_seed(1)
    for part, weight in model.named_parameters():
        if "norm" in part:
            torch.nn.init.ones_(weight)
        else:
            meets = any(word in part for word in ("mixer", "k_proj", "v_proj"))
            torch.nn.init.normal_(weight, std=1.0 if meets else 0.25)
    return model if kind == name else model.double()


@dataclass(frozen=True)
class Answer:
    """What `model.generate` writes behind a prompt of P tokens.

    Attributes:
        tokens: ending with the end-of-text token, or LONGEST.
        logits: [len(tokens), V], from which each was chosen.
        error: how far a logit may be off by rounding, as a full forward pass in float64 shows.
        sure: tokens up to the first that rounding might change.
    """

    tokens: tuple[int, ...]
    logits: torch.Tensor
    error: float
    sure: int


@cache
def _double(name: str) -> YocoForCausalLM:
    return copy.deepcopy(tiny_model(name)).double()


@cache
@torch.no_grad()
def answer(name: str, prompt: tuple[int, ...]) -> Answer:
    """The answer to a prompt, computed once."""
    model, ids = tiny_model(name), torch.tensor([prompt])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False)
    tokens = tuple(whole[0, len(prompt) :].tolist())
    logits = model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    exact = _double(name)(whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    size = float(logits.abs().max())
    error = max(float((logits - exact).abs().max()), 1e-6 * size)  # retention's sums are float32 in any model
    doubtful = (best[:, 0] - best[:, 1] <= max(DOUBTFUL * size, 4 * error)).nonzero()
    sure = int(doubtful[0]) if len(doubtful) else len(tokens)
    assert tokens[:sure] == tuple(logits[:sure].argmax(-1).tolist())
    return Answer(tokens, logits, error, sure)


def base_text(name: str, which: int) -> tuple[int, ...]:
    """One of a few texts of 40 tokens that prompts begin with."""
    draw = random.Random(f"{name} {which}")
    return tuple(draw.randrange(3, VOCAB) for _ in range(40))


@cache
def prompts(name: str, which: int) -> tuple[int, ...]:
    """One of any number of prompts, many of which begin alike: parts of few texts, some with an end of their own,
    and further turns of conversations."""
    draw = random.Random(f"prompt {name} {which}")
    base = base_text(name, draw.randrange(2))
    kind = draw.choice(("begins", "begins", "ends otherwise", "turn", "own"))
    own = tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 6)))
    if kind == "begins":
        return base[: draw.randint(1, len(base))]
    if kind == "ends otherwise":
        return base[: draw.randint(0, len(base) - 8)] + own
    if kind == "turn" and which:
        earlier = prompts(name, draw.randrange(which))
        return (earlier + answer(name, earlier).tokens[: draw.randint(1, 9)] + own)[:60]
    return own * draw.randint(1, 4)
