"""One new token a sequence on a GPU, as a CUDA graph: a decode step costs what its kernels cost, not what Python costs.

The graph is recorded at the second step in a row on the same cache (one whose rows are reordered at every step, as
in beam search, is not worth a recording) and replayed from then on, at whatever positions the cache has reached.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from oncelm.cache import Batch, Selection, YocoCache
from oncelm.models.plain import Wiring
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.yoco.mixers.registry import kinds_of
from oncelm.models.yoco.model import CrossAttention, CrossDecoder, DecoderLayer, FeedForward, SelfDecoder, run_layers

if TYPE_CHECKING:
    from oncelm.models.yoco.config import YocoConfig
    from oncelm.models.yoco.modeling import YocoForCausalLM

# modules whose `forward` a graph can stand for, beside mixers that say so
PLAIN_MODULES = (
    nn.Embedding, nn.Linear, nn.ModuleList, RMSNorm, SelfDecoder, CrossDecoder, DecoderLayer, CrossAttention,
    FeedForward,
)  # fmt: skip
WARM_UP_STEPS = 1  # steps without a graph: they compile the kernels and allocate what libraries want


class Stepper:
    """Decode steps of one model with one cache.

    Attributes:
        tokens, positions: [N, 1] what a step reads; `positions` moves on by itself.
        logits: [N, V] what a step leaves.
    """

    def __init__(self, model: YocoForCausalLM, cache: YocoCache) -> None:
        self.model, self.past = model, cache.step_form()
        self.wiring, self.key = Wiring(model, plain_modules(model.config)), _key(model, cache)
        self.tokens = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=model.device)
        self.positions = torch.zeros_like(self.tokens)
        self.reached: tuple[int, ...] | None = None  # where `positions` stands
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a graph can stand for the model: nothing in it that runs Python of its own at every step."""
        return self.wiring.is_plain

    @torch.no_grad()  # a cache holds values, not graphs
    def __call__(self, tokens: torch.Tensor, cache: YocoCache) -> torch.Tensor:
        """Append tokens [N, 1]: logits [N, V], valid until the next step."""
        self.tokens.copy_(tokens)
        if self.reached != cache.lengths:
            self.positions.copy_(torch.tensor(cache.lengths)[:, None])
        self.reached = None  # unless this step ends well
        batch = Batch((*cache.lengths,), (1,) * len(tokens), tuple(n + 1 for n in cache.lengths), self.positions)
        cache.begin()
        if self.graph is None and self.steps >= WARM_UP_STEPS and tokens.is_cuda:
            self._record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()
        cache.commit(batch, 1)
        self.steps, self.reached = self.steps + 1, batch.ends
        return self.logits

    def _record(self) -> None:
        """Recording runs nothing: the cache and the positions are as before."""
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self.tokens.device)
        # thread_local: what other threads ask of the GPU meanwhile is no error
        with (
            torch.cuda.device(stream.device),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self._run()
        self.graph = graph

    def _run(self) -> None:
        model = self.model
        batch = Batch.step(self.positions)
        x = run_layers(
            model.config, model.self_decoder, model.cross_decoder, model.embed(self.tokens), batch, self.past,
            Selection(batch, columns=slice(None)), model.token_parts,
        )  # fmt: skip
        assert x is not None
        self.logits = model.token_parts(x).head(x, model.layer_norm, model.output_projection)[:, -1]
        self.positions += 1


def plain_modules(config: YocoConfig) -> tuple[type[nn.Module], ...]:
    """The modules of a model whose `forward` a graph can stand for."""
    return (*PLAIN_MODULES, *(mixer for mixer in kinds_of(config) if mixer.in_cuda_graphs))


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Of the model's GPU: torch's default is of whichever was current first, and would record nothing of another."""
    return torch.cuda.Stream(device)


_STEPPERS: WeakKeyDictionary[YocoCache, Stepper] = WeakKeyDictionary()


def stepper(model: YocoForCausalLM, cache: YocoCache) -> Stepper:
    """The Stepper of this cache, a new one where the cache has moved in memory or the model has other modules or
    weights than it was made with."""
    found = _STEPPERS.get(cache)
    if found is None or found.model is not model or found.key != _key(model, cache) or not found.wiring.is_unchanged:
        found = _STEPPERS[cache] = Stepper(model, cache)
    return found


def _key(model: YocoForCausalLM, cache: YocoCache) -> tuple[int, ...]:
    """What a graph would read and write beside the weights, and of how many sequences: it is recorded anew where that
    has changed."""
    return model.gemm_changes, cache.batch_size, *(tensor.data_ptr() for tensor in cache.tensors().values())
