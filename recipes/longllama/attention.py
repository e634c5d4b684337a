"""How much of a memory layer's attention finds the pass key, among ever more distractors (arXiv 2307.03170)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from oncelm.cache.longllama.memory_kv import MemoryKV
from oncelm.eval.codec import Codec
from oncelm.eval.examples import Generate
from oncelm.models import LongLlamaForCausalLM


@contextlib.contextmanager
def watched_memory() -> Iterator[list[torch.Tensor]]:
    """Within, the weights [H, tokens so far] of every memory layer in turn, for each pass of a single token."""
    weights: list[torch.Tensor] = []
    original = MemoryKV.attend

    def attend(self, q, k, raw_k, v, window):
        outputs = original(self, q, k, raw_k, v, window)
        if q.shape[1] == 1:
            keys = self.k[0, : window.remembered[0] + window.batch.ends[0]].float()  # in the order of the text
            queries = q[0, 0].float().unflatten(0, (keys.shape[1], -1))  # [H_kv, G, D]
            scores = torch.einsum("hgd,shd->hgs", queries, keys) * q.shape[-1] ** -0.5
            weights.append(scores.softmax(-1).flatten(0, 1))
        return outputs

    MemoryKV.attend = attend
    try:
        yield weights
    finally:
        MemoryKV.attend = original


@torch.no_grad()
def key_attention(model: LongLlamaForCausalLM, codec: Codec, example: Generate) -> list[float]:
    """Of a passkey example, for each memory layer: the share that its best head gives to the digit that is predicted,
    in the text, mean over the answer's digits."""
    digits, answer = codec.encode(example.target), codec.encode(f" {example.target}")
    windows = np.lib.stride_tricks.sliding_window_view(example.prompt, len(digits))
    starts = np.flatnonzero((windows == digits).all(1)).tolist()
    ids = np.concatenate([example.prompt, answer[: len(answer) - len(digits)], digits])
    text = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    first = text.shape[1] - len(digits) - 1  # the token that the first digit follows
    cache = model.new_cache(1, text.shape[1])
    model.prefill(text[:, :first], cache)
    shares = []
    with watched_memory() as weights:
        for i in range(len(digits)):
            weights.clear()
            model(text[:, first + i : first + i + 1], past_key_values=cache, logits_to_keep=1)
            places = torch.tensor([s + i for s in starts], device=model.device)
            shares.append(torch.stack([layer[:, places].sum(-1).max() for layer in weights]))
    return torch.stack(shares).mean(0).tolist()
