"""The equality ladder on a GPU: prefill, decoding, padding, subsets and losses as on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.models.small import KINDS, VOCAB, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize("kind", KINDS),
]
close = {"rtol": 1e-3, "atol": 1e-3}


def make_pair(kind: str):
    """The same weights on both devices; heads wide enough for every attention kernel."""
    here = make_model(kind, hidden_size=128, num_self_heads=2, num_attention_heads=4)
    there = make_model(kind, hidden_size=128, num_self_heads=2, num_attention_heads=4).cuda()
    return here, there


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def test_logits_and_loss_are_the_cpus(kind: str) -> None:
    here, there = make_pair(kind)
    ids = draw_ids(2, 300)
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    index = torch.tensor([0, 5, 100, 299])
    for arguments in ({}, {"attention_mask": mask}, {"logits_to_keep": index}, {"labels": ids}):
        on_gpu = {name: value.cuda() for name, value in arguments.items()}
        expected, got = here(ids, use_cache=False, **arguments), there(ids.cuda(), use_cache=False, **on_gpu)
        for name in ("loss", "logits"):
            if expected.get(name) is not None:
                torch.testing.assert_close(got[name].cpu(), expected[name], **close)


def test_prefill_and_decode(kind: str) -> None:
    _, model = make_pair(kind)
    ids = draw_ids(2, 200).cuda()
    expected = model(ids, use_cache=False).logits
    cache = model.new_cache(2, 200)
    torch.testing.assert_close(model.prefill(ids[:, :190], cache, chunk_size=64), expected[:, 189], **close)
    for t in range(190, 200):
        logits = model(ids[:, t : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], **close)


def test_generate_with_padding(kind: str) -> None:
    _, model = make_pair(kind)
    ids = draw_ids(2, 30).cuda()
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    together = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 13:], **options)
    assert torch.equal(together[1, 13:], alone[0])


def test_bf16_stays_near_float32(kind: str) -> None:
    _, model = make_pair(kind)
    ids = draw_ids(1, 400).cuda()
    exact = model(ids, use_cache=False).logits
    rounded = model.bfloat16()(ids, use_cache=False).logits.float()
    assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_compiled_and_float8_prefill(kind: str) -> None:
    _, model = make_pair(kind)
    model.bfloat16()
    ids = draw_ids(1, 500).cuda()
    expected = model.prefill(ids, model.new_cache(1, 500), chunk_size=200).float()
    for quantization, allowed in ((None, 0.06), ("float8", 0.3)):
        model.compile_layers().set_quantization(quantization)
        got = model.prefill(ids, model.new_cache(1, 500), chunk_size=200).float()
        assert (got - expected).norm() < allowed * expected.norm()


def test_compiled_gradients(kind: str) -> None:
    _, model = make_pair(kind)
    ids = draw_ids(2, 200).cuda()
    gradients = []
    for compiled in (False, True):
        model.zero_grad()
        model.compile_layers(compiled)(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()
