"""torch.compile for the token-wise parts of the layers: norms, rotations, gates and residual sums in few kernels.

Each part is compiled once for all layers of a kind, not once a layer: dynamo takes a layer's weights as inputs. What
mixes tokens stays as it is, so every memory works, and a chunk's place in the text never reaches a compiler.

    part              kinds of layers            without gradients      with gradients
    before, after     self, cross                one graph, any T       one graph a batch shape
    keys_and_values   -                          one graph, any T       one graph a batch shape

(B = 1 and B > 1 are two graphs; so are two dtypes.)
"""

from __future__ import annotations

import functools
from typing import Self

import torch

from oncelm.models.yoco.model import PLAIN, TokenParts

MIN_TOKENS = (
    64  # in all rows; for fewer, as in decoding, checking a compiled part's conditions takes longer than it saves
)
MAX_GRAPHS = 64  # of one part, over all models of a process; torch's own limit, 8, is one model's training and prefill


@functools.cache
def compiled_parts(gradients: bool) -> TokenParts:
    """The compiled parts, for all models; nothing is compiled before the first call of each.

    Prompts come in any length, so graphs without gradients take any T from the start. Training batches are of one
    shape, and a fixed shape makes better backward kernels.
    """
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=None if gradients else True)
    return TokenParts(compiled(PLAIN.before), compiled(PLAIN.after), compiled(PLAIN.keys_and_values))


class CompiledLayers:
    """The part of YocoForCausalLM that chooses how its layers' token-wise parts are computed."""

    _compiles_layers = False

    def compile_layers(self, enabled: bool = True) -> Self:
        """Compute the token-wise parts of the layers with torch.compile, wherever at least MIN_TOKENS tokens are read:
        in prefill, scoring and training.

        The first pass of each kind compiles, which takes some ten seconds on a GPU. Results agree to rounding. Needs a
        C++ compiler (CPU) or Triton (GPU).

        Args:
            enabled: False goes back to plain PyTorch.

        Returns:
            The model itself.
        """
        self._compiles_layers = enabled
        return self

    def token_parts(self, x: torch.Tensor) -> TokenParts:
        """How to compute a layer's token-wise parts on x [B, T, d]."""
        if self._compiles_layers and x.shape[0] * x.shape[1] >= MIN_TOKENS:
            return compiled_parts(torch.is_grad_enabled())
        return PLAIN
