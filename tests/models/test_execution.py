"""Compiled layers compute what plain ones do, once compiled for all layers and all places in a text; float8; chunks."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from oncelm.models import compiling
from oncelm.models.yoco import execution
from oncelm.models.yoco.model import PLAIN
from tests.models.small import VOCAB, make_long, make_model

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters, reason="torch 2.11 has one limit for all"
)
@pytest.mark.parametrize("gradients", [True, False])
def test_other_compiled_functions_keep_their_limit(gradients: bool) -> None:
    before = torch._dynamo.config.recompile_limit
    compiling.compiled.__wrapped__(lambda owner: owner, "kind", gradients)
    assert torch._dynamo.config.recompile_limit == before < compiling.MAX_GRAPHS


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def losses_and_gradients(model, ids, **options):
    model.zero_grad()
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retention", "window"])
def test_prefill_compiles_once_whatever_the_depth_and_the_chunks(kind: str) -> None:
    ids = draw_ids(1, 300)
    counts = []
    for layers in (1, 3):
        torch._dynamo.reset()
        counters.clear()
        model = make_model(kind, num_self_decoder_layers=layers)
        expected = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        model.compile_layers()
        with torch.no_grad():
            for chunk_size in (100, 77):  # the last chunk of 77 is shorter: 69
                got = model.prefill(ids, model.new_cache(1, 300), chunk_size=chunk_size)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        counts.append(graphs())
    assert counts[0] == counts[1] == 3  # before, after, keys_and_values


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retention", "window"])
def test_training_gives_the_same_gradients(kind: str) -> None:
    ids = draw_ids(2, 40)
    counts = []
    for layers in (1, 2):
        model = make_model(kind, num_self_decoder_layers=layers, num_cross_decoder_layers=layers).train()
        loss, gradients = losses_and_gradients(model, ids)
        model.compile_layers()
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            got_loss, got = losses_and_gradients(model, ids)
            torch.testing.assert_close(got_loss, loss, rtol=1e-4, atol=1e-5)
            for name, gradient in gradients.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
        counts.append(graphs())
    assert counts[0] == counts[1] == 5  # before and after of each half, keys_and_values


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mem_positionals", [True, False])
def test_longllama_reads_and_trains_compiled_as_plain(mem_positionals: bool) -> None:
    """One form of each part for memory layers and one for the others, whatever the depth; rows see each other."""
    ids, rows = draw_ids(1, 300), draw_ids(4, 64)
    crossbatch = {"cross_batch_range": 3, "cross_batch_stepping": True, "dataset_packing": 2}
    counts = []
    for depth in (3, 5):
        torch._dynamo.reset()
        counters.clear()
        model = make_long(
            num_hidden_layers=depth, max_position_embeddings=80, last_context_length=70, mem_positionals=mem_positionals
        )
        expected = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        loss, gradients = losses_and_gradients(model, rows, **crossbatch)
        model.compile_layers()
        got = model.prefill(ids, model.new_cache(1, 300))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for checkpointing in (False, True):
            if checkpointing:
                model.train().gradient_checkpointing_enable()
            got_loss, found = losses_and_gradients(model, rows, **crossbatch)
            torch.testing.assert_close(got_loss, loss, rtol=1e-4, atol=1e-5)
            for name, gradient in gradients.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
        counts.append(graphs())
    assert counts[0] == counts[1] == 8  # before and after, of two kinds of layers, with gradients and without


def test_longllama_decodes_plain() -> None:
    model = make_long().compile_layers()
    assert not model.compiles(torch.zeros(1, 63, 32))
    assert model.compiles(torch.zeros(2, 32, 32))


@pytest.fixture
def float8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch multiplies float8 on a CPU too, if slowly."""
    monkeypatch.setattr(execution, "check_float8", lambda device, dtype: None)


@pytest.mark.parametrize("kind", ["retention", "window"])
def test_float8_prefill_is_near_and_leaves_all_else_exact(kind: str, float8_anywhere) -> None:
    model = make_model(kind, num_self_key_value_heads=None).bfloat16()
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    ids = draw_ids(1, 100)
    names = list(model.state_dict())
    expected = model(ids, use_cache=False).logits
    few = model(ids[:, :20], use_cache=False).logits
    model.set_quantization("float8")
    assert list(model.state_dict()) == names
    with torch.no_grad():
        got = model.prefill(ids, model.new_cache(1, 100), chunk_size=100)
    error = (got - expected[:, -1]).norm() / expected[:, -1].norm()
    assert 0 < error < 0.2
    assert torch.equal(model(ids[:, :20], use_cache=False).logits, few)
    model(ids, labels=ids).loss.backward()  # exact: float8 has no gradients
    assert torch.equal(model.set_quantization(None)(ids, use_cache=False).logits, expected)


def test_rounded_weights_follow_the_model(float8_anywhere) -> None:
    model = make_model("retention").set_quantization("float8")
    before = model.self_decoder.layers[0].ffn.fc1.rounded
    model.bfloat16()
    after = model.self_decoder.layers[0].ffn.fc1.rounded
    assert after.values.dtype == before.values.dtype == torch.float8_e4m3fn
    assert after.scales.dtype == torch.float32


def test_quantization_errors_teach(float8_anywhere) -> None:
    with pytest.raises(ValueError, match="did you mean 'float8'"):
        make_model("retention").set_quantization("flaot8")
    with pytest.raises(ValueError, match="multiples of 16; this model has 40"):
        make_model("retention", intermediate_size=40).set_quantization("float8")


@given(free=st.integers(0, 1 << 40), bytes_per_token=st.integers(1, 1 << 20))
def test_chunks_are_powers_of_two_that_fit(free: int, bytes_per_token: int) -> None:
    least, most = execution.GPU_CHUNK_TOKENS
    chunk = execution.fitting_chunk(free, bytes_per_token)
    assert least <= chunk <= most
    assert chunk & (chunk - 1) == 0
    assert chunk == least or chunk * bytes_per_token <= free / 2
    assert chunk == most or 2 * chunk * bytes_per_token > free / 2


def test_few_tokens_stay_plain() -> None:
    """Decoding: checking the conditions of compiled code takes longer than it saves."""
    model = make_model("retention").compile_layers()
    assert model.token_parts(torch.zeros(1, compiling.MIN_TOKENS - 1, 32)) is PLAIN
    assert model.token_parts(torch.zeros(2, compiling.MIN_TOKENS // 2, 32)) is not PLAIN
    assert model.compile_layers(False).token_parts(torch.zeros(1, 999, 32)) is PLAIN


@pytest.mark.parametrize("kind", ["retention", "window"])
def test_prefill_reads_no_value_but_to_check_the_ids(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would have to be waited for. Fake tensors have no values: reading one is an error."""
    model = make_model(kind)
    monkeypatch.setattr("oncelm.models.yoco.modeling.check_tokens", lambda ids, *_: ids)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids = mode.from_tensor(draw_ids(2, 50))
        assert model.prefill(ids, model.new_cache(2, 50), chunk_size=20).shape == (2, VOCAB)


def test_chunks_on_a_cpu_shrink_with_the_batch() -> None:
    model = make_model("retention")
    assert [model.prefill_chunk_size(rows) for rows in (1, 2, 100)] == [2048, 1024, 256]
