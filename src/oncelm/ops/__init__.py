"""Tensors in, tensors out: the numerical core, without modules or configuration."""

from oncelm.ops.attention import decode_attention, global_attention, window_attention
from oncelm.ops.crossbatch import crossbatch_attention
from oncelm.ops.gated_delta import gated_delta
from oncelm.ops.gated_delta.step import gated_delta_step
from oncelm.ops.gated_retention import gated_retention
from oncelm.ops.gated_retention.step import gated_retention_step
from oncelm.ops.linear_cross_entropy import linear_cross_entropy
from oncelm.ops.norm import rms_norm
from oncelm.ops.quantize import dequantize_kv, quantize_kv
from oncelm.ops.rope import apply_rope, rope_frequencies, rope_rotation
from oncelm.ops.short_convolution import short_convolution, short_convolution_step
from oncelm.ops.swiglu import swiglu
from oncelm.ops.vocab_parallel import vocab_parallel_cross_entropy

__all__ = [
    "apply_rope",
    "crossbatch_attention",
    "decode_attention",
    "dequantize_kv",
    "gated_delta",
    "gated_delta_step",
    "gated_retention",
    "gated_retention_step",
    "global_attention",
    "linear_cross_entropy",
    "quantize_kv",
    "rms_norm",
    "rope_frequencies",
    "rope_rotation",
    "short_convolution",
    "short_convolution_step",
    "swiglu",
    "vocab_parallel_cross_entropy",
    "window_attention",
]
