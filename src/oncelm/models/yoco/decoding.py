"""A YOCO's decode step, one new token a sequence: the same code runs directly or is recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import proxy

import torch
from torch import nn

from oncelm.cache import Batch, Past, Selection, YocoCache
from oncelm.cache.base import SequenceCache
from oncelm.models.checks import check_tokens
from oncelm.models.inputs import is_next_token
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.step_graph import StepGraph, StepGraphs
from oncelm.models.wanted import Keep
from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.mixers.registry import kinds_of
from oncelm.models.yoco.model import (
    CrossAttention,
    CrossDecoder,
    DecoderLayer,
    FeedForward,
    SelfDecoder,
    TokenParts,
    run_layers,
)

# modules whose `forward` a graph can stand for, beside mixers that say so
PLAIN_MODULES = (
    nn.Embedding, nn.Linear, nn.ModuleList, RMSNorm, SelfDecoder, CrossDecoder, DecoderLayer, CrossAttention,
    FeedForward,
)  # fmt: skip


class Decoding:
    """The part of YocoForCausalLM that decodes.

    Attributes:
        use_cuda_graphs: for decode steps on a GPU; False goes back to plain PyTorch.
    """

    use_cuda_graphs = True
    config: YocoConfig
    self_decoder: SelfDecoder
    cross_decoder: CrossDecoder | None
    layer_norm: RMSNorm
    output_projection: nn.Linear
    quantization_changes: int
    embed: Callable[[torch.Tensor], torch.Tensor]
    token_parts: Callable[[torch.Tensor], TokenParts]
    _check_cache: Callable[[object], None]

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, cache: YocoCache) -> torch.Tensor:
        """Append tokens [N, 1], one a sequence, to a cache: logits [N, V]. On a GPU a CUDA graph.

        `forward` does this by itself where it is given one token and a cache on a GPU, unless adapters, hooks or other
        things are in the model that a graph would pass over, or `model.use_cuda_graphs` is False.

        Raises:
            ValueError: tokens of another shape, or a cache of another model or without room for them; nothing has been
                changed then.
        """
        self._check_cache(cache)
        if tokens.shape != (cache.batch_size, 1):
            raise ValueError(f"a step takes a token a sequence, [{cache.batch_size}, 1], got {list(tokens.shape)}.")
        graph = self._graph(cache)
        if graph is not None:
            return self._replay(graph, tokens, cache)
        batch = Batch.dense(cache.lengths, 1, tokens.device)
        cache.begin()
        logits = self.next_logits(tokens, batch, cache)[:, -1]
        cache.commit(batch, 1)
        return logits

    def next_logits(self, tokens: torch.Tensor, batch: Batch, past: Past) -> torch.Tensor:
        """Logits [N, T, V] of new tokens [N, T], which `past` takes in. A CUDA graph may hold it, of a `Batch.step`."""
        x = run_layers(
            self.config, self.self_decoder, self.cross_decoder, self.embed(tokens), batch, past,
            Selection(batch, columns=slice(None)), self.token_parts,
        )  # fmt: skip
        assert x is not None
        return self.token_parts(x).head(x, self.layer_norm, self.output_projection)

    def _graph(self, cache: YocoCache) -> StepGraph | None:
        """What takes a step with this cache, which then has room for it; None where no graph stands for the model."""
        cache.check_room((1,) * cache.batch_size)
        if not self.use_cuda_graphs or cache.recording:
            return None
        graphs = self.__dict__.setdefault("_graphs", StepGraphs())
        if not graphs.stand_for(self, partial(plain_modules, self.config)):
            return None
        cache.reserve(cache.num_tokens + 1)

        def make() -> StepGraph:
            self._check_cache(cache)
            # weak: it is the model that holds its graphs, and what it holds goes when it goes
            run = partial(type(self).next_logits, proxy(self), past=cache.step_form())
            return StepGraph(lambda tokens, batch: run(tokens, batch)[:, -1], cache.batch_size, cache.device)

        return graphs.find(cache, (self.quantization_changes, cache.batch_size, cache.addresses()), make)

    def _replay(self, graph: StepGraph, tokens: torch.Tensor, cache: YocoCache) -> torch.Tensor:
        lengths = cache.lengths
        cache.begin()
        logits = graph(tokens, lengths).clone()
        ends = tuple(length + 1 for length in lengths)
        cache.commit(Batch(lengths, (1,) * len(lengths), ends, graph.positions), 1)
        return logits

    def _quick_step(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: SequenceCache,
        logits_to_keep: Keep,
    ) -> torch.Tensor | None:
        if (
            not input_ids.is_cuda
            or not isinstance(cache, YocoCache)
            or input_ids.shape != (cache.batch_size, 1)
            or not (logits_to_keep is None or (isinstance(logits_to_keep, int) and logits_to_keep in (0, 1)))
            or not is_next_token(attention_mask, position_ids, cache.lengths, cache.columns)
        ):
            return None
        tokens = check_tokens(input_ids, None, self.config)
        graph = self._graph(cache)
        return None if graph is None else self._replay(graph, tokens, cache)[:, None]


def plain_modules(config: YocoConfig) -> tuple[type[nn.Module], ...]:
    """The modules of a model whose `forward` a graph can stand for."""
    return (*PLAIN_MODULES, *(mixer for mixer in kinds_of(config) if mixer.in_cuda_graphs))
