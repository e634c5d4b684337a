"""What every public op promises of its inputs: however they lie in memory, whatever their dtypes, with gradients or
without, the result is that of contiguous tensors, in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oncelm import ops
from oncelm.ops.attention.partial import partial_attention
from oncelm.ops.float8 import round_rows

LENGTHS = [0, 5, 2, 0]  # of packed sequences; they have seven tokens
B, T, H, H_KV, D, V = 2, 7, 4, 2, 16, 13


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(rows: int = B, keys: int = T) -> dict[str, Tensor]:
    return {name: draw(rows, n, h, D, seed=n + h) for name, n, h in (("q", T, H), ("k", keys, H_KV), ("v", keys, H_KV))}


def retention(rows: int = B) -> dict[str, Tensor]:
    shapes = {"q": (H, D), "k": (H, D), "v": (H, D + 2), "g": (H,)}
    made = {name: draw(rows, T, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return made | {"g": -made["g"].abs()}


def delta(rows: int = B) -> dict[str, Tensor]:
    made = retention(rows)
    return made | {"k": F.normalize(made["k"], dim=-1), "beta": draw(rows, T, H, seed=5).sigmoid()}


def convolution(rows: int = B, states: int = B) -> dict[str, Tensor]:
    return {
        "x": draw(rows, T, D),
        "weight": draw(D, 4, seed=1),
        "initial_state": draw(states, 3, D, seed=2),
    }


def borders() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0)


def step(op: Callable[..., Tensor], state: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The op with a state of its own, which it changes."""
    state = state.float().contiguous().clone()
    return op(**inputs, state=state), state


def rope(pairing: str) -> Callable[..., Tensor]:
    return lambda x, rotation: ops.apply_rope(x, rotation, pairing)


def decode(**inputs: Tensor) -> dict[str, Tensor]:
    return {name: x[:, -3:] if name == "q" else x for name, x in qkv().items()} | inputs


def quantized(dtype: torch.dtype) -> dict[str, Tensor]:
    k, v = (ops.quantize_kv(x, dtype) for x in (draw(6, 16, H_KV, D, seed=1), draw(6, 16, H_KV, D, seed=2)))
    return {
        "k": k[0],
        "v": v[0],
        "k_scale": k[1],
        "v_scale": v[1],
        "block_tables": torch.tensor([[3, 1, 0], [5, 2, 4]]),
    }


Case = tuple[dict[str, Tensor], Callable[..., Any]]


BACKENDS = {
    "gated_retention": ["chunk", "recurrent", "naive"],
    "gated_delta": ["chunk", "recurrent", "naive"],
    "short_convolution": ["shifts", "naive"],
    "attention": ["sdpa", "naive"],
    "crossbatch_attention": ["blocks", "naive"],
}


def cases(backends: dict[str, list[str]]) -> dict[str, Case]:
    """A name -> inputs, and the function of them."""
    one_row = {name: x[:1] for name, x in qkv().items()}
    packed = one_row | {"cu_seqlens": borders()}
    step_inputs = {**retention(), "state": draw(5, H, D, D + 2), "slots": torch.tensor([4, 1])}
    crossbatch = {"cross_batch_range": 1, "cross_batch_stepping": False, "dataset_packing": 1, "rope_theta": 1e4}
    rotation = ops.rope_rotation(torch.arange(T)[None], ops.rope_frequencies(D, 1e4, "standard"))
    positions = torch.tensor([[0, 2, 2, 4, 5, 5, 6]])
    found: dict[str, Case] = {
        "rms_norm": ({"x": draw(B, T, D), "weight": draw(D)}, lambda x, weight: ops.rms_norm(x, weight, 1e-5)),
        "swiglu": ({"x": draw(B, T, D), "gate": draw(B, T, D, seed=1)}, ops.swiglu),
        "rope interleaved": ({"x": draw(B, T, H, D), "rotation": rotation}, rope("interleaved")),
        "rope half": ({"x": draw(B, T, H, D), "rotation": rotation}, rope("half")),
        "partial attention": (qkv(), partial_attention),
        "quantize_kv": ({"x": draw(B, T, D)}, lambda x: ops.quantize_kv(x, torch.int8)),
        "round_rows": ({"x": draw(B, T, D)}, round_rows),
        "linear_cross_entropy": (
            {"hidden": draw(T, D), "weight": draw(V, D, seed=1), "targets": torch.arange(T) % V},
            ops.linear_cross_entropy,
        ),
    }
    for backend in backends["gated_retention"]:

        def retain(backend: str = backend, **inputs: Any) -> Any:
            return ops.gated_retention(**inputs, output_final_state=True, backend=backend)

        found[f"gated_retention {backend}"] = {**retention(), "initial_state": draw(B, H, D, D + 2)}, retain
        found[f"gated_retention packed {backend}"] = {**retention(1), "cu_seqlens": borders()}, retain
    found["gated_retention_step"] = step_inputs, lambda **inputs: step(ops.gated_retention_step, **inputs)
    delta_step = {**delta(), "state": draw(B, H, D, D + 2)}
    found["gated_delta_step"] = delta_step, lambda **inputs: step(ops.gated_delta_step, **inputs)
    for backend in backends["gated_delta"]:

        def overwrite(backend: str = backend, **inputs: Any) -> Any:
            return ops.gated_delta(**inputs, output_final_state=True, backend=backend)

        found[f"gated_delta {backend}"] = {**delta(), "initial_state": draw(B, H, D, D + 2)}, overwrite
        found[f"gated_delta packed {backend}"] = {**delta(1), "cu_seqlens": borders()}, overwrite
    for backend in backends["short_convolution"]:

        def convolve(backend: str = backend, **inputs: Any) -> Any:
            return ops.short_convolution(**inputs, output_final_state=True, backend=backend)

        found[f"short_convolution {backend}"] = convolution(), convolve
        found[f"short_convolution packed {backend}"] = {**convolution(1, 4), "cu_seqlens": borders()}, convolve
    for backend in backends["attention"]:

        def window(backend: str = backend, **inputs: Any) -> Tensor:
            return ops.window_attention(**inputs, window_size=3, backend=backend)

        def causal(backend: str = backend, **inputs: Any) -> Tensor:
            return ops.global_attention(**inputs, backend=backend)

        def last(backend: str = backend, **inputs: Any) -> Tensor:
            return ops.decode_attention(**inputs, backend=backend)

        found[f"window_attention {backend}"] = qkv(keys=T + 2), window
        found[f"window_attention packed {backend}"] = packed, window
        found[f"global_attention {backend}"] = qkv(keys=T + 2), causal
        found[f"global_attention packed {backend}"] = packed, causal
        found[f"global_attention of positions {backend}"] = qkv() | {"positions": positions}, causal
        found[f"global_attention of one query {backend}"] = {**qkv(), "q": draw(B, 1, H, D)}, causal
        found[f"decode_attention {backend}"] = decode(lengths=torch.tensor([7, 4])), last
        for dtype in (torch.int8, torch.float8_e4m3fn):
            inputs = decode(lengths=torch.tensor([37, 20]), **quantized(dtype))
            found[f"decode_attention of pages in {dtype} {backend}"] = inputs, last
    for backend in backends["crossbatch_attention"]:
        found[f"crossbatch_attention {backend}"] = (
            qkv(),
            lambda backend=backend, **inputs: ops.crossbatch_attention(**inputs, **crossbatch, backend=backend),
        )
    return found


CASES = cases(BACKENDS)
# these compute without gradients, and say so
WITHOUT_GRADIENTS = (
    "decode_attention",
    "gated_delta_step",
    "gated_retention_step",
    "partial attention",
    "quantize_kv",
    "round_rows",
)
MIXED = ("x", "gate", "weight", "hidden", "q", "k", "v", "g", "beta", "initial_state")  # inputs that may have any dtype
each = pytest.mark.parametrize("name", CASES)


def as_it_is(x: Tensor) -> Tensor:
    return x


def strided(x: Tensor) -> Tensor:
    """Its last dimension has gaps."""
    return x.new_ones(*x.shape, 2).copy_(x[..., None])[..., 0]


def between_others(x: Tensor) -> Tensor:
    """It begins at an odd place, and its rows are an odd number of elements apart."""
    odd = x.new_ones(*x.shape[:-1], x.shape[-1] + 2 + x.shape[-1] % 2 - 1)
    return odd[..., 1 : 1 + x.shape[-1]].copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


def expanded(x: Tensor) -> Tensor:
    """All rows are the first, in one place."""
    return x[:1].expand(x.shape)


LAYOUTS = [as_it_is, strided, between_others, transposed, expanded]


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [x for x in results if x is not None]


def close(found: Any, expected: Any) -> None:
    for got, wanted in zip(tensors(found), tensors(expected), strict=True):
        assert got.dtype == wanted.dtype
        if got.dtype == torch.float8_e4m3fn:
            got, wanted = got.float(), wanted.float()
        torch.testing.assert_close(got, wanted)


def laid_out(inputs: dict[str, Tensor], layouts: list[Callable]) -> dict[str, Tensor]:
    """Slots have to differ and borders to rise: these are not expanded, which makes them all equal."""
    return {
        name: layout(x) if layout is not expanded or name not in ("slots", "cu_seqlens") else x
        for (name, x), layout in zip(inputs.items(), layouts, strict=False)
    }


@each
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_layout_in_memory(name: str, data: st.DataObject) -> None:
    inputs, function = CASES[name]
    layouts = data.draw(st.lists(st.sampled_from(LAYOUTS), min_size=len(inputs), max_size=len(inputs)))
    given_inputs = laid_out(inputs, layouts)
    before = {key: x.clone() for key, x in given_inputs.items()}
    found = function(**given_inputs)
    close(found, function(**{key: x.clone(memory_format=torch.contiguous_format) for key, x in given_inputs.items()}))
    for key, x in given_inputs.items():
        assert torch.equal(x.double(), before[key].double()), f"{key} was changed"


@each
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_gradients_change_neither_dtype_nor_value(name: str, data: st.DataObject) -> None:
    inputs, function = CASES[name]
    learns = not name.startswith(WITHOUT_GRADIENTS)
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
    decoding = name.startswith("decode_attention")  # it asks for one dtype of queries and cache
    if decoding:
        dtype = data.draw(dtypes)
        inputs = {key: x.to(dtype) if x.dtype == torch.float64 else x for key, x in inputs.items()}
    else:
        inputs = {key: x.to(data.draw(dtypes)) if key in MIXED else x for key, x in inputs.items()}
    with torch.no_grad():
        expected = function(**inputs)
    with torch.enable_grad():
        leaves = {key: x.clone().requires_grad_(learns and x.is_floating_point()) for key, x in inputs.items()}
        found = function(**leaves)
    close(found, expected)
    assert all(x.requires_grad == learns for x in tensors(found)[:1])


CHOSEN = cases({op: ["auto"] for op in BACKENDS})


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHOSEN)
def test_any_layout_on_a_gpu(name: str) -> None:
    """The implementations that a GPU gets, in dtypes that kernels take."""
    inputs, function = CHOSEN[name]
    for dtype in (torch.float32, torch.bfloat16):
        moved = {key: (x.to(dtype) if x.dtype == torch.float64 else x).cuda() for key, x in inputs.items()}
        for layout in LAYOUTS:
            given_inputs = laid_out(moved, [layout] * len(moved))
            plain = {key: x.clone(memory_format=torch.contiguous_format) for key, x in given_inputs.items()}
            close(function(**given_inputs), function(**plain))
