"""What Hugging Face tools take for granted of every model: hooks, arguments, losses and caches mean what they say."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from oncelm.models import head as heads
from oncelm.models.longllama import model as long_model
from oncelm.models.plain import Wiring, is_plain_linear, is_untouched
from oncelm.models.yoco import model as yoco_model
from oncelm.models.yoco.decoding import plain_modules
from tests.models.small import KINDS, VOCAB, make_long, make_model

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
families = pytest.mark.parametrize("family", ["yoco", "longllama"])
close = {"rtol": 1e-4, "atol": 1e-5}


def make(family: str):
    return make_model("retention") if family == "yoco" else make_long(pad_token_id=1)


def make_one_window(family: str):
    """Where a LongLLaMA cuts windows depends on how its text came in pieces; a text of one window has no cuts."""
    one_window = {"max_position_embeddings": 64, "last_context_length": 64, "pad_token_id": 1}
    return make_model("retention") if family == "yoco" else make_long(**one_window)


def draw_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(3))


class Scaled(nn.Linear):
    """A stand-in for an adapter: more than the product with the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x)


def replace_head(model) -> None:
    head = model.get_output_embeddings()
    scaled = Scaled(head.in_features, head.out_features, bias=False)
    scaled.weight = head.weight
    model.set_output_embeddings(scaled)


# -- the loss -------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("how", ["module", "hook", "pre-hook", "instance"])
def test_the_loss_is_of_the_models_own_logits(family: str, how: str) -> None:
    """Whatever a tool has made of the output projection."""
    model, ids = make(family), draw_ids(2, 20)
    before = model(ids, labels=ids).loss
    head = model.get_output_embeddings()
    if how == "module":
        replace_head(model)
    elif how == "hook":
        head.register_forward_hook(lambda module, args, output: 1.5 * output)
    elif how == "pre-hook":
        head.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    else:
        head.forward = lambda x: 1.5 * F.linear(x, head.weight)
    found = model(ids, labels=ids)
    expected = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    assert abs(found.loss - before) > 0.01


@families
def test_a_heads_gradients_do_not_depend_on_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(family).train(), draw_ids(2, 20)
    replace_head(model)
    gradients = []
    for rows in (1000, 7):
        monkeypatch.setattr(heads, "LOGITS_AT_ONCE", rows * VOCAB)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for whole, blocks in zip(*gradients, strict=True):
        torch.testing.assert_close(blocks, whole, **close)


def test_a_head_without_targets_has_a_loss_of_zero() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = heads.head_loss(Scaled(8, 5, bias=False), hidden, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0


@families
def test_accumulated_batches_are_one_large_batch(family: str) -> None:
    model = make(family).train()
    assert model.accepts_loss_kwargs
    ids, labels = draw_ids(4, 12), draw_ids(4, 12)
    for row, learned in enumerate((2, 11, 4, 7)):
        labels[row, : 12 - learned] = -100
    model(ids, labels=labels).loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    targets = (labels[:, 1:] != -100).sum()
    for row in range(4):
        part = slice(row, row + 1)
        model(ids[part], labels=labels[part], num_items_in_batch=targets).loss.backward()
    for p, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, **close)


@families
def test_labels_come_with_logits_in_evaluation_alone(family: str) -> None:
    """Trainer's metrics ask for predictions and cannot say so; in training nobody needs a [T, vocabulary] tensor."""
    model, ids = make(family), draw_ids(2, 20)
    torch.testing.assert_close(model(ids, labels=ids).logits, model(ids, use_cache=False).logits, **close)
    assert model(ids, labels=ids, logits_to_keep=torch.empty(0, dtype=torch.long)).logits is None
    assert model.train()(ids, labels=ids).logits is None
    assert model(ids, labels=ids, logits_to_keep=0).logits.shape == (2, 20, VOCAB)


@families
def test_shifted_labels_are_targets(family: str) -> None:
    model, ids = make(family), draw_ids(2, 9)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)


# -- hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "longllama"])
def test_hooks_fire_on_every_module(kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_long() if kind == "longllama" else make_model(kind), draw_ids(2, 12)
    if compiled:  # as compiled and fused parts do, these pass the modules over; not where there are hooks
        if kind == "longllama":
            monkeypatch.setattr(type(model), "_parts", lambda self, x: long_model.Parts(*long_model.PLAIN))
        else:
            monkeypatch.setattr(type(model), "token_parts", lambda self, x: yoco_model.TokenParts(*yoco_model.PLAIN))
    expected = model(ids, use_cache=False).logits
    fired: list[str] = []
    names = {}
    for name, module in model.named_modules():
        in_turn = "interleaved" in kind and name in ("self_decoder", "cross_decoder")
        if name and not isinstance(module, nn.ModuleList) and not in_turn:
            names[name] = module.register_forward_hook(lambda *_, name=name: fired.append(name))
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert set(fired) == set(names)
    assert fired.count("lm_head" if kind == "longllama" else "output_projection") == 1


def test_a_hook_may_change_what_a_mixer_gives() -> None:
    model, ids = make_model("retention"), draw_ids(1, 9)
    before = model(ids, use_cache=False).logits
    handle = model.self_decoder.layers[0].mixer.register_forward_hook(lambda module, args, output: 0 * output)
    assert not torch.allclose(model(ids, use_cache=False).logits, before)
    handle.remove()
    assert torch.equal(model(ids, use_cache=False).logits, before)


@pytest.mark.parametrize("name", ["self_decoder", "cross_decoder"])
def test_hooks_that_could_never_fire_are_refused(name: str) -> None:
    """Interleaved halves are not called as a whole."""
    model = make_model("interleaved")
    getattr(model, name).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=rf"register them on {name}.layers"):
        model(draw_ids(1, 4))


def test_what_counts_as_plain() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert is_plain_linear(layer)
    assert not is_plain_linear(nn.Linear(4, 4))
    assert not is_plain_linear(Scaled(4, 4, bias=False))
    assert not is_plain_linear(nn.Linear(4, 4, bias=False, device="meta"))
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook, layer.register_full_backward_hook):
        handle = register(lambda *_: None)
        assert not is_untouched(layer)
        handle.remove()
        assert is_untouched(layer)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_untouched(layer)
    handle.remove()
    layer.forward = lambda x: x
    assert not is_untouched(layer)


# -- decode graphs --------------------------------------------------------------------------------------------------


def test_wiring_notices_what_a_graph_would_miss() -> None:
    model = make_model("retention")
    mixer = model.self_decoder.layers[1].mixer

    def wiring() -> Wiring:
        return Wiring(model, plain_modules(model.config))

    made = wiring()
    assert made.is_plain
    assert made.is_unchanged
    handle = mixer.register_forward_hook(lambda *_: None)
    assert not made.is_plain
    handle.remove()
    assert made.is_plain
    mixer.v_proj.weight.data = mixer.v_proj.weight.data.clone()
    assert not made.is_unchanged
    made, mixer.q_proj.weight = wiring(), nn.Parameter(mixer.q_proj.weight.detach().clone())
    assert not made.is_unchanged
    made = wiring()
    mixer.out_proj.forward = lambda x: x
    assert not made.is_unchanged
    assert not wiring().is_plain
    del mixer.out_proj.forward
    assert made.is_unchanged
    nn.utils.parametrizations.weight_norm(mixer.g_proj)
    assert not made.is_unchanged
    assert not wiring().is_plain
    nn.utils.parametrize.remove_parametrizations(mixer.g_proj, "weight")
    made, mixer.k_proj = wiring(), Scaled(32, 32, bias=False)
    assert not made.is_unchanged
    assert not wiring().is_plain


@pytest.mark.parametrize("name", ["conv_weight", "A_log", "dt_bias"])
def test_wiring_notices_parameters_of_any_name(name: str) -> None:
    model = make_model("delta")
    mixer, made = model.self_decoder.layers[1].mixer, Wiring(model, plain_modules(model.config))
    setattr(mixer, name, nn.Parameter(getattr(mixer, name).detach().clone()))
    assert not made.is_unchanged


@pytest.mark.parametrize("change", ["adapter", "hook", "weight", "data", "in place", "off"])
def test_steps_follow_a_changed_model(change: str) -> None:
    """With the same cache, as adapters are attached, switched and merged in the middle of a text."""
    model, ids = make_model("retention"), draw_ids(2, 12)
    cache = model.new_cache(2, 12)
    model.prefill(ids[:, :6], cache)
    for t in range(6, 9):
        model.step(ids[:, t : t + 1], cache)
    layer = model.cross_decoder.layers[1]
    with torch.no_grad():
        if change == "adapter":
            layer.ffn.fc2 = Scaled(48, 32, bias=False)
        elif change == "hook":
            layer.ffn.register_forward_hook(lambda module, args, output: 2 * output)
        elif change == "weight":
            layer.mixer.q_proj.weight = nn.Parameter(torch.randn(32, 32))
        elif change == "data":
            layer.mixer.q_proj.weight.data = torch.randn(32, 32)
        elif change == "in place":
            layer.mixer.q_proj.weight.mul_(2)
        else:
            model.use_cuda_graphs = False
    logits = model.step(ids[:, 9:10], cache)
    torch.testing.assert_close(logits, model(ids[:, :10], use_cache=False).logits[:, -1], rtol=1e-3, atol=1e-3)
    assert (model._graph(cache) is None) == (change in ("adapter", "hook", "off"))
    assert not logits.requires_grad
    assert not any(tensor.requires_grad for tensor in cache.tensors().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("change", ["adapter", "hook", "weight", "data", "in place", "off"])
def test_a_replayed_graph_follows_a_changed_model(change: str) -> None:
    make_here = make_model
    model, ids = make_here("retention", hidden_size=64, num_self_heads=4).cuda(), draw_ids(2, 40).cuda()
    cache = model.new_cache(2, 40)
    model.prefill(ids[:, :20], cache)
    for t in range(20, 25):
        model(ids[:, t : t + 1], past_key_values=cache)
    assert model._graph(cache).graph is not None
    layer, fired = model.cross_decoder.layers[1], []
    with torch.no_grad():
        if change == "adapter":
            layer.ffn.fc2 = Scaled(48, 64, bias=False).cuda()
        elif change == "hook":
            layer.mixer.register_forward_hook(lambda *_: fired.append(1))
        elif change == "weight":
            layer.mixer.q_proj.weight = nn.Parameter(torch.randn(64, 64, device="cuda"))
        elif change == "data":
            layer.mixer.q_proj.weight.data = torch.randn(64, 64, device="cuda")
        elif change == "in place":
            layer.mixer.q_proj.weight.mul_(2)
        else:
            model.use_cuda_graphs = False
    fresh = model.new_cache(2, 40)
    model.prefill(ids[:, :25], fresh)
    for _ in range(4):
        cache.restore(fresh.snapshot())
        logits = model(ids[:, 25:26], past_key_values=cache).logits[:, -1]
    expected = model(ids[:, :26], use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert len(fired) == (6 if change == "hook" else 0)  # a prefill, four steps, the whole text
    assert not logits.requires_grad or change == "off"
    assert not any(tensor.requires_grad for tensor in cache.tensors().values())


# -- arguments ------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("kwargs", [None, {}, {"use_reentrant": False}, {"preserve_rng_state": False}])
def test_checkpointing_gives_the_same_gradients(family: str, kwargs: dict | None) -> None:
    """{} is what peft.prepare_model_for_kbit_training passes; torch takes it for the reentrant kind."""
    model, ids = make(family).train(), draw_ids(1, 50)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, **close)


@families
def test_checkpointing_by_the_hook_alone(family: str) -> None:
    model = make(family).train()
    model._set_gradient_checkpointing(True, partial(checkpoint))
    functions = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert functions
    assert all(function.keywords["use_reentrant"] is False for function in functions)


@families
def test_what_tools_pass_along_is_taken(family: str) -> None:
    model, ids = make(family), draw_ids(2, 9)
    along = {"tokenizer": object(), "cache_position": torch.arange(9), "token_type_ids": torch.zeros_like(ids)}
    assert torch.equal(model(ids, use_cache=False, **along).logits, model(ids, use_cache=False).logits)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'atention_mask'; did you mean 'attention_mask'"):
        model(ids, atention_mask=None)
    with pytest.raises(ValueError, match="is_causal=False is not offered"):
        model(ids, is_causal=False)
    with pytest.raises(ValueError, match="output_router_logits=True is not offered"):
        model(ids, output_router_logits=True)


@families
def test_outputs_asked_for_by_the_configuration_count_too(family: str) -> None:
    model, ids = make(family), draw_ids(1, 9)
    with pytest.raises(ValueError, match="output_attentions is not offered"):
        model.config.output_attentions = True
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == model.config.num_hidden_layers + 1


@families
def test_position_ids_say_what_is_packed(family: str) -> None:
    """As DataCollatorWithFlattening, TRL and others make rows; borders may come beside them."""
    model, ids = make(family), draw_ids(1, 12)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    labels = ids.clone()
    labels[positions == 0] = -100
    expected = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :5], ids[:, 5:])], 1)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    for model_mode in (model.eval(), model.train()):
        for arguments in (
            {"position_ids": positions},
            {"position_ids": positions[0]},
            {"position_ids": positions, "attention_mask": torch.ones_like(ids)},
            {"cu_seqlens": borders},
            {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 7, "position_ids": positions},
        ):
            found = model_mode(ids, labels=labels, logits_to_keep=0, **arguments)
            torch.testing.assert_close(found.logits, expected, **close)
            parts = [F.cross_entropy(part[:-1], want[1:], reduction="sum") for part, want in (
                (expected[0, :5], ids[0, :5]), (expected[0, 5:], ids[0, 5:]))]  # fmt: skip
            torch.testing.assert_close(found.loss, sum(parts) / 10, **close)
    torch.testing.assert_close(model.eval()(ids, position_ids=positions).logits, expected, **close)


@families
def test_padding_behind_packed_sequences_is_seen_by_nobody(family: str) -> None:
    model, ids = make(family), draw_ids(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0]])
    mask = torch.tensor([[1] * 9 + [0] * 3])
    found = model(ids, position_ids=positions, attention_mask=mask).logits[:, :9]
    expected = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:9])], 1)
    torch.testing.assert_close(found, expected, **close)


@families
def test_position_ids_of_ordinary_rows_change_nothing(family: str) -> None:
    model, ids = make_one_window(family), draw_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    usual = (mask.cumsum(1) - 1).clamp_min(0)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    for positions in (usual, usual + 5):  # only distances count
        assert torch.equal(model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits, expected)
    cache = model.new_cache(2, 9)
    model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    later = model(ids[:, 6:], attention_mask=mask, position_ids=usual[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(later, expected[:, 6:], **close)


@families
@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1, 2, 4]] * 2, "must count up by one"),
        ([[0, 1, 0, 1]] * 2, "packed sequences stand in one row"),
        ([[0, 1, 2]] * 2, r"position_ids must be \[B, T\] = \[2, 4\]"),
        ([[0.0, 1, 2, 3]] * 2, "position_ids must be integers"),
    ],
)
def test_position_ids_that_would_be_passed_over_are_refused(family: str, positions: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(family)(draw_ids(2, 4), position_ids=torch.tensor(positions))


@families
def test_position_ids_must_go_on_from_the_cache(family: str) -> None:
    model, ids = make(family), draw_ids(1, 6)
    cache = model.new_cache(1, 6)
    model.prefill(ids[:, :3], cache)
    with pytest.raises(ValueError, match="position_ids has 0 in row 0, column 0; this token is number 3"):
        model(ids[:, 3:], past_key_values=cache, position_ids=torch.arange(3)[None])
    assert cache.lengths == (3,)


@families
def test_a_mask_cannot_hide_what_a_cache_has_read(family: str) -> None:
    model, ids = make(family), draw_ids(2, 8)
    cache = model.new_cache(2, 8)
    model.prefill(ids[:, :5], cache)
    mask = torch.ones_like(ids)
    mask[1, 3:5] = 0
    with pytest.raises(ValueError, match="attention_mask hides tokens that the cache has taken in"):
        model(ids[:, 5:], past_key_values=cache, attention_mask=mask)
    assert cache.lengths == (5, 5)


def test_memory_beside_a_cache_is_refused_by_a_yoco() -> None:
    model, ids = make_model("retention"), draw_ids(1, 4)
    with pytest.raises(ValueError, match="give it without past_key_values and use_cache"):
        model(ids, past=object(), use_cache=True)
    with pytest.raises(ValueError, match="give it without past_key_values and use_cache"):
        model(ids, past=object(), past_key_values=model.new_cache(1, 4))


def test_a_kind_of_memory_where_there_is_none_to_make_is_refused_by_a_longllama() -> None:
    model, ids = make_long(), draw_ids(1, 4)
    with pytest.raises(ValueError, match="past_key_values has one already"):
        model(ids, memory="cpu", past_key_values=model.new_cache(1, 4))
    with pytest.raises(ValueError, match="a pass with gradients has none"):
        model(ids, memory="cpu", use_cache=False)
    with pytest.raises(ValueError, match="past_key_values is one"):
        model.generate(ids, memory="cpu", past_key_values=model.new_cache(1, 40), **GREEDY)
    with pytest.raises(ValueError, match="without use_cache"):
        model(draw_ids(4, 8), cross_batch_range=1, use_cache=True)
    for options in ({}, {"use_cache": False}):
        expected = model.generate(draw_ids(1, 30), **options, **GREEDY)
        assert torch.equal(model.generate(draw_ids(1, 30), memory="cpu", **options, **GREEDY), expected)


# -- generate -------------------------------------------------------------------------------------------------------


@families
def test_a_second_turn_on_the_cache_that_generate_returned(family: str) -> None:
    model, ids, more = make_one_window(family), draw_ids(2, 20), draw_ids(2, 25)[:, 20:]
    first = model.generate(ids, return_dict_in_generate=True, attention_mask=torch.ones_like(ids), **GREEDY)
    text = torch.cat((first.sequences, more), 1)
    mask = torch.ones_like(text)
    second = model.generate(text, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, model.generate(text, attention_mask=mask, **GREEDY))


@families
def test_a_cache_that_is_given_is_used(family: str) -> None:
    """Also where the configuration says that none is to be made."""
    model, ids = make_one_window(family), draw_ids(1, 20)
    expected = model.generate(ids, **GREEDY)
    model.config.use_cache = model.generation_config.use_cache = False
    cache = model.new_cache(1)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    assert cache.lengths == (27,)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@families
def test_right_padded_prompts_are_refused(family: str) -> None:
    model, ids = make(family), draw_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    for options in ({}, {"use_cache": False}, {"past_key_values": model.new_cache(2, 30)}):
        with pytest.raises(ValueError, match=r"padded on the right .* in row 1"):
            model.generate(ids, attention_mask=mask, **options, **GREEDY)


# -- without the head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "longllama"])
def test_the_base_model_gives_hidden_states(kind: str) -> None:
    model, ids = make_long(pad_token_id=1) if kind == "longllama" else make_model(kind), draw_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    head = model.get_output_embeddings()
    for arguments in ({"use_cache": False}, {"attention_mask": mask, "use_cache": True}):
        found = model.base_model(input_ids=ids, **arguments)
        assert found.last_hidden_state.shape == (2, 20, 32)
        torch.testing.assert_close(head(found.last_hidden_state), model(ids, **arguments).logits, **close)
    assert found.past_key_values.lengths == (20, 15)
    options = {"use_cache": False, "return_dict": False, "output_hidden_states": False, "output_attentions": False}
    assert torch.equal(model.get_decoder()(ids, **options)[0], model.base_model(ids, use_cache=False).last_hidden_state)
    inner, outer = ({id(p) for p in part.parameters()} for part in (model.base_model, head))
    assert inner | outer == {id(p) for p in model.parameters()}
    assert inner & outer == (outer if model.config.tie_word_embeddings else set())
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = model.base_model(ids[:1], position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(head(packed), model(ids[:1], position_ids=positions, use_cache=False).logits, **close)


@families
def test_the_base_model_has_gradients(family: str) -> None:
    model, ids = make(family).train(), draw_ids(1, 20)
    model.base_model(ids).last_hidden_state.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["output_projection.weight" if family == "yoco" else "lm_head.weight"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@families
def test_labels_outside_the_vocabulary_are_refused_on_a_gpu_too(family: str) -> None:
    model, ids = make(family).cuda(), draw_ids(2, 20).cuda()
    for learned in (0, 5):  # every position, and some
        labels = ids.clone()
        labels[:, :learned] = -100
        labels[1, 9] = VOCAB
        for mode in (model.train(), model.eval()):
            with pytest.raises(ValueError, match=f"labels has {VOCAB}"):
                mode(ids, labels=labels)


# -- what compiled parts, packing and crossbatch must not pass over --------------------------------------------------


@pytest.mark.parametrize(
    "name", ["self_decoder.layers.0.ffn.fc1", "cross_decoder.kv_layer_norm", "cross_decoder.layers.1.mixer"]
)
def test_a_hook_put_on_after_compiling_fires(name: str) -> None:
    """torch.compile looks for hooks once: layers with hooks are computed without it."""
    model, ids = make_model("retention").compile_layers(), draw_ids(2, 40)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        model.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)
        after = model(ids, use_cache=False).logits
        torch.testing.assert_close(after, model.compile_layers(False)(ids, use_cache=False).logits, **close)
    assert not torch.allclose(after, before, **close)


@families
def test_seq_idx_says_what_is_packed(family: str) -> None:
    model, ids = make(family), draw_ids(1, 12)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7])
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    expected = model(ids, cu_seqlens=borders, use_cache=False).logits
    for arguments in ({"seq_idx": seq_idx}, {"cu_seq_lens_k": borders}):
        assert torch.equal(model(ids, use_cache=False, **arguments).logits, expected)
    with pytest.raises(ValueError, match=r"seq_idx must be \[1, T\]"):
        model(draw_ids(2, 12), seq_idx=seq_idx.expand(2, -1))


@families
def test_masks_of_sequence_numbers_are_refused(family: str) -> None:
    """They would count as a mask of ones, and documents would read each other."""
    mask = torch.tensor([[1] * 5 + [2] * 4])
    for wrong in (mask, torch.where(mask == 1, 0.0, -1e9)):
        with pytest.raises(ValueError, match="attention_mask must hold 1 at tokens and 0 at padding"):
            make(family)(draw_ids(1, 9), attention_mask=wrong)


@families
def test_shifted_positions_go_without_a_cache_alone(family: str) -> None:
    model, ids = make(family), draw_ids(1, 9)
    with pytest.raises(ValueError, match="this token is number 0"):
        model(ids, position_ids=torch.arange(9)[None] + 3, use_cache=True)


def test_crossbatch_refuses_packed_rows_however_they_are_told() -> None:
    model, ids = make_long(cross_batch_range=1, dataset_packing=1).train(), draw_ids(1, 12)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    for call in (model, model.base_model):
        for arguments in ({"position_ids": positions}, {"cu_seqlens": torch.tensor([0, 5, 12])}, {"use_cache": True}):
            with pytest.raises(ValueError, match="crossbatch is a way of training"):
                call(ids, **arguments)


def test_a_head_without_a_weight_of_its_own() -> None:
    model, ids = make_model("retention"), draw_ids(2, 9)
    expected = model(ids, labels=ids).loss
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


def test_a_frozen_base_model_is_frozen() -> None:
    model, ids = make_model("retention").train(), draw_ids(1, 9)
    for parameter in model.base_model.parameters():
        parameter.requires_grad = False
    model(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["output_projection.weight"]


@families
def test_hidden_states_have_gradients_in_evaluation(family: str) -> None:
    model = make(family).eval()
    assert model.base_model(draw_ids(1, 9)).last_hidden_state.requires_grad
    with torch.no_grad():
        assert model.base_model(draw_ids(1, 9)).past_key_values.lengths == (9,)
