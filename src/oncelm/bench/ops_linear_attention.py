"""The ops of linear attention that `oncelm bench ops` measures."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from oncelm.bench.op_case import Function, OpCase, Sizes, Tensor
from oncelm.models.work import Work
from oncelm.ops import gated_delta, gated_retention, short_convolution


def state_op_case(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: Callable[[Sizes, Callable[..., Tensor]], tuple[Tensor, ...]],
    fla: Callable[[Sizes], Function],
    sizes: dict[str, tuple[Sizes, ...]],
    products: tuple[int, int],
) -> OpCase:
    """An op of queries, keys, values and gates, which keeps a state [D, D] a head.

    products: with a state, 2 D^2 FLOPs each a head and token: of the forward pass, and with the backward pass.
    """

    def by(backend: str) -> Callable[[Sizes], Function]:
        return lambda n: lambda *tensors: op(*tensors, backend=backend)[0]

    def plain(n: Sizes) -> Function:
        def run(*tensors: Tensor) -> Tensor:
            q = tensors[0]
            with torch.autocast(q.device.type, q.dtype, enabled=q.dtype.itemsize == 2):
                return op(*tensors, backend="chunk")[0]

        return run

    def work(tensors: int, products: int) -> Callable[[Sizes, int], Work]:
        """q, k, v, o, and for gradients again, with theirs."""

        def count(n: Sizes, size: int) -> Work:
            tokens = n["B"] * n["T"] * n["H"]
            return Work(0, products * 2 * tokens * n["D"] ** 2, tensors * tokens * n["D"] * size)

        return count

    return OpCase(
        sizes=sizes,
        inputs=inputs,
        ours=by("auto"),
        exact=by("naive"),
        plain=plain,
        peers={"PyTorch": plain, "flash-linear-attention": fla},
        work=work(4, products[0]),
        work_both=work(11, products[1]),
    )


def gated_retention_case() -> OpCase:
    def inputs(n: Sizes, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        q, k, v = (normal(n["B"], n["T"], n["H"], n["D"]) for _ in "qkv")
        return q, k, v, F.logsigmoid(normal(n["B"], n["T"], n["H"]).float()) / 16

    def fla(n: Sizes) -> Function:
        from fla.ops.simple_gla import chunk_simple_gla

        return lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g, scale=q.shape[-1] ** -0.5)[0]

    sizes: dict[str, tuple[Sizes, ...]] = {
        "gate": ({"B": 2, "T": 300, "H": 2, "D": 64},),
        "cpu": ({"B": 1, "T": 1024, "H": 4, "D": 64},),
        "cuda": ({"B": 1, "T": 32768, "H": 24, "D": 128}, {"B": 1, "T": 32768, "H": 12, "D": 256}),
    }
    return state_op_case(gated_retention, inputs, fla, sizes, products=(2, 7))  # k^T v and q S


def gated_delta_case() -> OpCase:
    def inputs(n: Sizes, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        q, k, v = (normal(n["B"], n["T"], n["H"], n["D"]) for _ in "qkv")
        g, beta = (normal(n["B"], n["T"], n["H"]).float() for _ in range(2))
        return q, F.normalize(k, dim=-1), v, F.logsigmoid(g) / 4, beta.sigmoid()

    def fla(n: Sizes) -> Function:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta)[0]

    sizes: dict[str, tuple[Sizes, ...]] = {
        "gate": ({"B": 2, "T": 150, "H": 2, "D": 64},),
        "cpu": ({"B": 1, "T": 1024, "H": 4, "D": 64},),
        "cuda": ({"B": 1, "T": 32768, "H": 24, "D": 128},),
    }
    return state_op_case(gated_delta, inputs, fla, sizes, products=(3, 10))  # k S, k^T u and q S


def short_convolution_case() -> OpCase:
    def inputs(n: Sizes, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return normal(n["B"], n["T"], n["D"]), normal(n["D"], n["W"])

    def by(backend: str) -> Callable[[Sizes], Function]:
        return lambda n: lambda x, weight: short_convolution(x, weight, backend=backend)[0]

    def torchs(n: Sizes) -> Function:
        """torch's convolution, on the layout [B, D, T] that it asks for."""

        def run(x: Tensor, weight: Tensor) -> Tensor:
            padded = F.pad(x.mT, (n["W"] - 1, 0))
            return F.silu(F.conv1d(padded, weight[:, None], groups=n["D"])).mT.contiguous()

        return run

    def work(tensors: int) -> Callable[[Sizes, int], Work]:
        """x and y once, and backward again with their gradients."""
        return lambda n, size: Work(0, 0, tensors * n["B"] * n["T"] * n["D"] * size)

    return OpCase(
        sizes={
            "gate": ({"B": 2, "T": 100, "D": 64, "W": 4},),
            "cpu": ({"B": 1, "T": 1024, "D": 1024, "W": 4},),
            "cuda": ({"B": 1, "T": 32768, "D": 9216, "W": 4},),
        },
        inputs=inputs,
        ours=by("auto"),
        exact=by("naive"),
        plain=torchs,
        peers={"conv1d of torch": torchs},
        work=work(2),
        work_both=work(5),
    )
