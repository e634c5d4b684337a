"""How a YOCO's layers are executed: plain, compiled, by fused kernels or in float8, and how many tokens at a time.

Compiled are `before` and `after`, once for each kind of mixer, and `keys_and_values`, which makes the shared K/V.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from oncelm.models.compiling import CompilesLayers, compiled
from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.linear import MIN_FLOAT8_TOKENS, set_float8
from oncelm.models.yoco.mixers.base import Tensors
from oncelm.models.yoco.model import PLAIN, CrossDecoder, DecoderLayer, SelfDecoder, TokenParts
from oncelm.ops.attention import MOST_DECODED
from oncelm.ops.float8 import check_float8
from oncelm.utils.errors import check_choice, renamed

# bytes of a number -> tokens in all rows that fused kernels compute: decoding, and the one wanted token of a prefill.
# In float32 more rows than these do not fit the registers
MOST_FUSED = {2: 16, 4: 4}

# Tokens of a prefill chunk, in all rows. A CPU is fastest while activations stay near its caches (8192 tokens of d 512
# in bf16: 1.2 s in chunks of 2048, 1.45 s in one), a GPU while its matrix products are large.
CPU_CHUNK_TOKENS = 2048
GPU_CHUNK_TOKENS = (2048, 32768)  # fewest, most
MIN_CHUNK_COLUMNS = 256  # of each row, however many rows: a sliding window is read anew for each chunk


@functools.cache
def compiled_parts(parts: TokenParts, gradients: bool) -> TokenParts:
    """The parts, each in the compiled form of its kind of layers."""

    def before(layer: DecoderLayer, *inputs: Any) -> Any:
        return compiled(parts.before, type(layer.mixer).__name__, gradients)(layer, *inputs)

    def after(layer: DecoderLayer, *inputs: Any) -> Any:
        return compiled(parts.after, type(layer.mixer).__name__, gradients)(layer, *inputs)

    return TokenParts(before, after, compiled(parts.keys_and_values, "cross_decoder", gradients), parts.head)


@functools.cache
def side_by_side(parts: TokenParts) -> TokenParts:
    """The parts of a few tokens a sequence, [B, T, ...], computed as of one row, [1, B T, ...]: what is compiled for
    any number of tokens is not compiled again for each batch size."""

    def row(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.expand(len(x), *y.shape[1:]).reshape(1, -1, *y.shape[2:])

    def back(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y[0].unflatten(0, x.shape[:2])

    def before(layer: DecoderLayer, x: torch.Tensor, rotation: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
        inputs, gate = parts.before(layer, row(x, x), row(rotation, x))
        return tuple(back(y, x) for y in inputs), None if gate is None else back(gate, x)

    def after(layer: DecoderLayer, x: torch.Tensor, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        gate = None if gate is None else row(gate, x)
        return back(parts.after(layer, row(x, x), row(o, x), gate), x)

    def keys_and_values(
        cross: CrossDecoder, y: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = parts.keys_and_values(cross, row(y, y), row(rotation, y))
        return back(k, y), back(v, y)

    return TokenParts(before, after, keys_and_values, parts.head)


def activation_bytes(config: YocoConfig, element_size: int) -> int:
    """Bytes a token of a prefill chunk takes at the worst moment of a self-decoder layer.

    Before tokens meet: the embeddings, x, norm(x), q, k, v, the gate and rotated q, k. In the feed-forward layer: the
    embeddings, x twice, what retention gave, the gate, norm(x), and two activations of the inner width.
    """
    d, f = config.hidden_size, config.intermediate_size
    return element_size * max(9 * d, 6 * d + 2 * f)


def fitting_chunk(free_bytes: int, bytes_per_token: int) -> int:
    """Tokens of a chunk whose activations take at most half of the free memory: a power of two in GPU_CHUNK_TOKENS.

    The other half is for what the allocator cannot join, and for kernels' own buffers.
    """
    least, most = GPU_CHUNK_TOKENS
    fitting = max(1, free_bytes // 2 // bytes_per_token)
    return min(most, max(least, 1 << (fitting.bit_length() - 1)))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses: what the driver has left, and what torch's allocator holds in reserve."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@functools.cache
def has_fused_kernels(dtype: torch.dtype) -> bool:
    """Whether fused.py and float8.py compute in this dtype here: they need Triton."""
    return dtype != torch.float64 and importlib.util.find_spec("triton") is not None


@functools.cache
def _kernel_parts(name: str) -> Any:
    """fused.py or float8.py, which cannot be imported without Triton."""
    return importlib.import_module(f"oncelm.models.yoco.{name}")


class Execution(CompilesLayers):
    """The part of YocoForCausalLM that decides how its layers are executed."""

    config: YocoConfig
    device: torch.device
    dtype: torch.dtype
    self_decoder: SelfDecoder
    quantization: str | None = None
    quantization_changes = 0  # how often rounded weights were made or dropped, which a recorded graph goes on to read

    def set_quantization(self, quantization: str | None) -> Self:
        """Choose how the self-decoder's matrices are multiplied where at least 64 tokens are read without gradients.

        Args:
            quantization: "float8" rounds both operands to float8 (e4m3) row by row: faster on an H100, a few percent of
                error in the logits, a byte more of memory for each weight; the projections of retention's decay and of
                the shared K/V stay exact. None multiplies in the model's dtype.

        Returns:
            The model itself. The rounded weights follow it to other devices, but not later changes of the weights: call
            this again after those.

        Raises:
            ValueError: an unknown name; a device that cannot; another dtype than bfloat16; sizes that are no multiples
                of 16; layers in 4 or 8 bits.
        """
        layers = self._float8_layers()
        if quantization is not None:
            check_choice("quantization", quantization, ("float8",))
            if getattr(self, "is_quantized", False):
                raise ValueError(
                    "quantization='float8' is for models in bfloat16; the layers of this one are quantised already."
                )
            check_float8(self.device, self.dtype)
            if odd := [size for layer in layers for size in layer.weight.shape if size % 16]:
                raise ValueError(
                    f"quantization='float8' needs layers whose sizes are multiples of 16; this model has {odd[0]}."
                )
        for layer in layers:
            set_float8(layer, quantization is not None)
        self.quantization, self.quantization_changes = quantization, self.quantization_changes + 1
        return self

    def set_gemm(self, *_: Any) -> None:
        raise renamed("method", "set_gemm", "set_quantization")

    def _float8_layers(self) -> list[nn.Linear]:
        layers: Any = self.self_decoder.layers
        found = [getattr(layer.mixer, name) for layer in layers for name in layer.mixer.float8_layers]
        found += [linear for layer in layers for linear in (layer.ffn.fc1, layer.ffn.gate, layer.ffn.fc2)]
        return [linear for linear in found if type(linear) is nn.Linear]

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """Another device or dtype: the rounded weights follow."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.quantization is not None:
            self.quantization_changes += 1
            for layer in self._float8_layers():
                set_float8(layer, True)
        return self

    def token_parts(self, x: torch.Tensor) -> TokenParts:
        """How to compute a layer's token-wise parts on x [B, T, d]."""
        tokens, gradients = x.shape[0] * x.shape[1], torch.is_grad_enabled()
        parts = PLAIN
        if x.is_cuda and not gradients and has_fused_kernels(x.dtype):
            if self.quantization == "float8" and tokens >= MIN_FLOAT8_TOKENS:
                parts = _kernel_parts("float8").FLOAT8
            elif 0 < tokens <= MOST_FUSED[x.dtype.itemsize]:
                parts = _kernel_parts("fused").FUSED
        if self.compiles(x):
            is_step = x.shape[0] > 1 and x.shape[1] <= MOST_DECODED and not gradients
            return side_by_side(compiled_parts(parts, gradients)) if is_step else compiled_parts(parts, gradients)
        return parts

    def prefill_chunk_size(self, batch_size: int = 1) -> int:
        """Tokens of each of `batch_size` rows that `prefill` reads at a time, unless told otherwise.

        On a GPU the choice follows from the memory that is free now: as much as fits in half of it, but no more than
        pays off. On a CPU it is what its caches like.
        """
        if self.device.type == "cpu":
            tokens = CPU_CHUNK_TOKENS
        elif self.device.type == "cuda":
            tokens = fitting_chunk(free_memory(self.device), activation_bytes(self.config, self.dtype.itemsize))
        else:
            tokens = GPU_CHUNK_TOKENS[0]
        return max(tokens // batch_size, MIN_CHUNK_COLUMNS)
