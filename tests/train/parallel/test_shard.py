"""A model split over ranks gives the loss and the gradients of one rank."""

from __future__ import annotations

import pytest
import torch

from tests.train.parallel.cases import make_tokens, one_rank, sharded
from tests.train.ranks import run_ranks

RETENTION = {"self_decoder": "gated_retention"}
WINDOW = {"self_decoder": "sliding_window", "window_size": 5, "num_self_key_value_heads": 2}
HYBRID = {
    "layer_types": ["sliding_window", "full_attention", "gated_retention", "cross_attention"],
    "num_self_decoder_layers": 3,
    "num_cross_decoder_layers": 1,
    "num_self_key_value_heads": 2,
}
both = pytest.mark.parametrize("options", [RETENTION, WINDOW], ids=["retention", "window"])


def check(size: int, options: dict, tensor: int = 1, chunk: int = 1) -> None:
    tokens = make_tokens(4, 12)
    expected_loss, expected = one_rank(tokens, tokens, options)
    for loss, found, norm in run_ranks(size, sharded, tokens, tokens, options, tensor, chunk):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name].double(), gradient, atol=1e-6, rtol=1e-4)
        whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        assert norm == pytest.approx(whole.item(), rel=1e-5)


@both
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_data(options: dict, tied: bool) -> None:
    check(2, options | {"tie_word_embeddings": tied})


@both
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tensor(options: dict, tied: bool) -> None:
    check(2, options | {"tie_word_embeddings": tied}, tensor=2)


def test_tensor_of_three_mixers() -> None:
    check(2, HYBRID, tensor=2)


@pytest.mark.slow
@both
def test_tensor_with_more_ranks_than_key_value_heads(options: dict) -> None:
    check(4, options, tensor=4)


@pytest.mark.slow
@both
def test_data_and_tensor(options: dict) -> None:
    check(4, options, tensor=2)


@pytest.mark.slow
@both
def test_data_and_chunk(options: dict) -> None:
    check(4, options, chunk=2)


@pytest.mark.slow
@both
def test_chunk_and_tensor(options: dict) -> None:
    check(4, options, tensor=2, chunk=2)
