"""The ops that `oncelm bench ops` measures, one entry each: inputs, definition, other implementations, least work.

To add an op, add a function that makes its `OpCase` to OPS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from oncelm.bench.op_case import Function, OpCase, Sizes, Tensor
from oncelm.bench.ops_linear_attention import gated_delta_case, gated_retention_case, short_convolution_case
from oncelm.models.work import Work, causal_pairs
from oncelm.ops import (
    crossbatch_attention,
    decode_attention,
    global_attention,
    linear_cross_entropy,
    window_attention,
)
from oncelm.ops.crossbatch import earlier_contexts

# ------------------------------------------------------------------------------------------------------------ attention


def window_attention_case() -> OpCase:
    def by(backend: str) -> Callable[[Sizes], Function]:
        return lambda n: lambda q, k, v: window_attention(q, k, v, window_size=n["W"], backend=backend)

    return OpCase(
        sizes={
            "gate": ({"B": 2, "T": 512, "H": 4, "H_kv": 2, "D": 64, "W": 200},),
            "cpu": ({"B": 1, "T": 2048, "H": 4, "H_kv": 2, "D": 64, "W": 256},),
            "cuda": (
                {"B": 1, "T": 131072, "H": 24, "H_kv": 24, "D": 128, "W": 1024},
                {"B": 8, "T": 2048, "H": 12, "H_kv": 12, "D": 64, "W": 1024},
            ),
        },
        inputs=_qkv,
        ours=by("auto"),
        exact=by("naive"),
        plain=by("sdpa"),
        peers={"FlashAttention of torch": _on_a_gpu(by("varlen")), "FlexAttention": _flex},
        work=lambda n, size: _attention_work(n, size, causal_pairs(n["T"], n["W"]), backward=False),
        work_both=lambda n, size: _attention_work(n, size, causal_pairs(n["T"], n["W"]), backward=True),
    )


def global_attention_case() -> OpCase:
    def by(backend: str) -> Callable[[Sizes], Function]:
        return lambda n: lambda q, k, v: global_attention(q, k, v, start=0, backend=backend)

    def repeated(n: Sizes) -> Function:
        """SDPA on heads repeated beforehand, as transformers did it for long."""

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x.repeat_interleave(n["H"] // n["H_kv"], dim=2) for x in (k, v))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return run

    return OpCase(
        sizes={
            "gate": ({"B": 2, "T": 300, "H": 4, "H_kv": 2, "D": 64},),
            "cpu": ({"B": 1, "T": 1024, "H": 4, "H_kv": 2, "D": 64},),
            "cuda": ({"B": 8, "T": 2048, "H": 24, "H_kv": 8, "D": 128},),
        },
        inputs=_qkv,
        ours=by("auto"),
        exact=by("naive"),
        plain=by("sdpa"),
        peers={"SDPA, repeated heads": repeated, "FlashAttention of torch": _on_a_gpu(_flash)},
        work=lambda n, size: _attention_work(n, size, causal_pairs(n["T"]), backward=False),
        work_both=lambda n, size: _attention_work(n, size, causal_pairs(n["T"]), backward=True),
    )


def decode_attention_case() -> OpCase:
    def inputs(n: Sizes, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        q, k, v = normal(n["N"], 1, n["H"], n["D"]), *(normal(n["N"], n["S"], n["H_kv"], n["D"]) for _ in "kv")
        return q, k, v, torch.full((n["N"],), n["S"], dtype=torch.int32, device=q.device)

    def by(backend: str) -> Callable[[Sizes], Function]:
        return lambda n: lambda q, k, v, lengths: decode_attention(q, k, v, lengths=lengths, backend=backend)

    def sdpa(n: Sizes) -> Function:
        return lambda q, k, v, lengths: global_attention(q, k, v, backend="sdpa")

    def work(n: Sizes, size: int) -> Work:
        """Each key and value once; two products of D with each key and query head."""
        pairs = n["N"] * n["S"]
        return Work(0, 4 * pairs * n["H"] * n["D"], 2 * pairs * n["H_kv"] * n["D"] * size)

    return OpCase(
        sizes={
            "gate": ({"N": 3, "S": 500, "H": 4, "H_kv": 2, "D": 64},),
            "cpu": ({"N": 1, "S": 8192, "H": 8, "H_kv": 4, "D": 64},),
            "cuda": ({"N": 1, "S": 131072, "H": 24, "H_kv": 8, "D": 128},),
        },
        inputs=inputs,
        ours=by("auto"),
        exact=by("naive"),
        plain=by("sdpa"),
        peers={"SDPA": sdpa},
        work=work,
    )


def _qkv(n: Sizes, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    q, k, v = (normal(n["B"], n["T"], heads, n["D"]) for heads in (n["H"], n["H_kv"], n["H_kv"]))
    return q, k, v


def _attention_work(n: Sizes, size: int, pairs: int, backward: bool) -> Work:
    """Two products a pair, and five more backward; q, o, k, v once, and backward again with their gradients."""
    moved = n["B"] * n["T"] * n["D"] * 2 * (n["H"] + n["H_kv"])
    flops = 2 * n["B"] * n["H"] * n["D"] * pairs
    return Work(0, (7 if backward else 2) * flops, (3 if backward else 1) * moved * size)


def _on_a_gpu(make: Callable[[Sizes], Function]) -> Callable[[Sizes], Function]:
    def load(n: Sizes) -> Function:
        if not torch.cuda.is_available():
            raise ImportError("runs on a GPU")
        return make(n)

    return load


def _flash(n: Sizes) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return global_attention(q, k, v, start=0, backend="sdpa")

    return run


@_on_a_gpu
def _flex(n: Sizes) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < n["W"])

    mask = torch.compile(create_block_mask)(visible, None, None, n["T"], n["T"], device="cuda")
    flex = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def crossbatch_attention_case() -> OpCase:
    """A forward pass of LongLLaMA's training: rows of several documents, k = 4 a document, stepping."""

    def by(backend: str) -> Callable[[Sizes], Function]:
        def load(n: Sizes) -> Function:
            return lambda q, k, v: crossbatch_attention(
                *(q, k, v),
                cross_batch_range=n["range"],
                cross_batch_stepping=True,
                dataset_packing=4,
                rope_theta=None,
                backend=backend,
            )

        return load

    def plain(n: Sizes) -> Function:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast(q.device.type, q.dtype, enabled=q.dtype.itemsize == 2):
                return by("naive")(n)(q, k, v)

        return run

    def work(backward: bool) -> Callable[[Sizes, int], Work]:
        def count(n: Sizes, size: int) -> Work:
            seen = sum(earlier_contexts(n["B"], n["range"], True, 4)) / n["B"]
            return _attention_work(n, size, int(causal_pairs(n["T"]) + seen * n["T"] ** 2), backward)

        return count

    shape = {"H": 9, "H_kv": 3, "D": 64}  # SmolLM2-135M's
    return OpCase(
        sizes={
            "gate": ({"B": 8, "T": 64, "range": 3, **shape},),
            "cpu": ({"B": 8, "T": 128, "range": 3, **shape},),
            "cuda": tuple({"B": 16, "T": 2048, "range": d, **shape} for d in (3, 15)),
        },
        inputs=_qkv,
        ours=by("auto"),
        exact=by("naive"),
        plain=plain,
        peers={"one context at a time in PyTorch": by("blocks"), "by FlashAttention": _on_a_gpu(by("flash"))},
        work=work(False),
        work_both=work(True),
    )


# ----------------------------------------------------------------------------------------------------------------- loss


def linear_cross_entropy_case() -> OpCase:
    """Hidden states in the computation's dtype, the weight in float32 under autocast, as in training."""

    def inputs(n: Sizes, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        hidden, weight = normal(n["M"], n["d"]), normal(n["V"], n["d"]).float() / n["d"] ** 0.5
        generator = torch.Generator().manual_seed(0)
        return hidden, weight, torch.randint(n["V"], (n["M"],), generator=generator).to(hidden.device)

    def in_autocast(function: Function) -> Callable[[Sizes], Function]:
        def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast(hidden.device.type, hidden.dtype, enabled=hidden.dtype.itemsize == 2):
                return function(hidden, weight, targets)

        return lambda n: run

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")

    def liger(n: Sizes) -> Function:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        if not torch.cuda.is_available():
            raise ImportError("runs on a GPU")
        options = {"reduction": "sum", "accum_dtype": torch.float32}
        return in_autocast(lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t, **options))(n)

    def work(products: int) -> Callable[[Sizes, int], Work]:
        """The products logits, and for gradients those of hidden states and weight; hidden states and weight once."""

        def count(n: Sizes, size: int) -> Work:
            moved = n["M"] * n["d"] * size + 4 * n["V"] * n["d"]
            return Work(products * 2 * n["M"] * n["V"] * n["d"], 0, moved if products == 1 else 2 * moved)

        return count

    return OpCase(
        sizes={
            "gate": ({"M": 700, "d": 64, "V": 3001},),
            "cpu": ({"M": 512, "d": 256, "V": 8000},),
            "cuda": ({"M": 32768, "d": 768, "V": 100288}, {"M": 32768, "d": 2048, "V": 100288}),
        },
        inputs=inputs,
        ours=in_autocast(linear_cross_entropy),
        exact=lambda n: plain,
        plain=in_autocast(plain),
        peers={"PyTorch": in_autocast(plain), "Liger": liger},
        work=work(1),
        work_both=work(3),
    )


OPS: dict[str, Callable[[], OpCase]] = {
    "gated_retention": gated_retention_case,
    "gated_delta": gated_delta_case,
    "short_convolution": short_convolution_case,
    "window_attention": window_attention_case,
    "global_attention": global_attention_case,
    "decode_attention": decode_attention_case,
    "crossbatch_attention": crossbatch_attention_case,
    "linear_cross_entropy": linear_cross_entropy_case,
}
