"""A sequence split over ranks gives the loss and the gradients of one rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oncelm.models.yoco.mixers.gated_retention import _state_from_zero
from tests.train.parallel.cases import in_chunks, make_tokens, one_rank
from tests.train.ranks import run_ranks

RETENTION = {"self_decoder": "gated_retention"}
WINDOW = {"self_decoder": "sliding_window", "window_size": 5}
FULL = {"self_decoder": "full_attention"}
HYBRID = {"layer_types": ["gated_retention", "full_attention", "cross_attention", "cross_attention"]}
both = pytest.mark.parametrize("options", [RETENTION, WINDOW], ids=["retention", "window"])


def check(size: int, tokens, labels, options: dict, cu_seqlens=None, checkpoint: bool = False) -> None:
    expected_loss, expected = one_rank(tokens, labels, options, cu_seqlens=cu_seqlens)
    # the log decay is float32 in any model: sums of it differ in their last bits
    rounding = 1e-6 if options.get("self_decoder", "gated_retention") == "gated_retention" else 1e-11
    for loss, found in run_ranks(size, in_chunks, tokens, labels, options, cu_seqlens, checkpoint):
        assert loss == pytest.approx(expected_loss, rel=rounding)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=rounding, rtol=rounding)


@both
@pytest.mark.parametrize("size", [2, 4])
def test_whole_rows(size: int, options: dict) -> None:
    tokens = make_tokens(2, 24)
    check(size, tokens, tokens, options)


@both
def test_rows_that_do_not_divide_among_the_ranks(options: dict) -> None:
    tokens = make_tokens(2, 21)
    check(4, tokens, tokens, options)


@pytest.mark.parametrize("window_size", [1, 2, 7, 9, 12, 40])
def test_windows_shorter_and_longer_than_chunks(window_size: int) -> None:
    tokens = make_tokens(1, 16)
    check(4, tokens, tokens, WINDOW | {"window_size": window_size})


@both
def test_chunks_without_any_target(options: dict) -> None:
    tokens = make_tokens(2, 24)
    labels = tokens.clone()
    labels[:, :15] = labels[:, 20] = -100
    check(4, tokens, labels, options)


@both
@pytest.mark.parametrize("borders", [[0, 5, 6, 12, 23, 24], [0, 24], [0, 1, 24], [0, 3, 21]])
def test_packed_sequences_that_begin_and_end_anywhere(options: dict, borders: list[int]) -> None:
    tokens = make_tokens(1, borders[-1])
    check(4, tokens, tokens, options, torch.tensor(borders, dtype=torch.int32))


@pytest.mark.parametrize("options", [FULL, HYBRID], ids=["full", "hybrid"])
def test_full_attention_in_packed_sequences(options: dict) -> None:
    tokens = make_tokens(1, 24)
    check(2, tokens, tokens, options, torch.tensor([0, 5, 16, 24], dtype=torch.int32))


@both
def test_layers_computed_again_in_the_backward_pass(options: dict) -> None:
    tokens = make_tokens(2, 24)
    check(2, tokens, tokens, options, checkpoint=True)


@both
@pytest.mark.parametrize("layout", ["unstacked", "interleaved"])
def test_layouts(options: dict, layout: str) -> None:
    tokens = make_tokens(2, 12)
    check(2, tokens, tokens, options | {"layout": layout})


@pytest.mark.parametrize("strength", [1 / 16, 1.0])
def test_states_of_long_chunks_keep_their_digits(strength: float) -> None:
    """At 131,072 tokens a rank, state, decay and gradients are off float64's by float32's rounding alone."""
    T, generator = 131072, torch.Generator().manual_seed(0)
    k, v, g = (torch.randn(1, T, 1, *tail, generator=generator, dtype=torch.float64) for tail in ((4,), (4,), ()))
    g = F.logsigmoid(g) * strength
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (k, v, g)]
        update, decay = _state_from_zero(*inputs)
        update.square().sum().backward()
        results.append((update.detach(), *(x.grad for x in inputs)))
        assert decay == g.sum().exp()  # 0 in either: that much is lost
    for found, exact in zip(*results, strict=True):
        assert (found - exact).norm() < 1e-6 * exact.norm()


def test_without_a_cross_decoder() -> None:
    tokens = make_tokens(2, 12)
    check(2, tokens, tokens, RETENTION | {"num_cross_decoder_layers": 0})
