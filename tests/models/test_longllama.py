"""LongLLaMA: the recorded outputs of the official code, windows, drop-in use of LLaMA folders, training, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import oncelm
from oncelm import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.cache.longllama.cache import plan
from oncelm.models.load import quiet_transformers
from tests.models.small import VOCAB, make_long, make_model

close = {"rtol": 0, "atol": 1e-4}
same = {"rtol": 0, "atol": 2e-5}


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(tokens, **{"use_cache": False, **options}).logits


# -- the official code's outputs --------------------------------------------------------------------------------------

NAMES = ["base", "nopos", "grouping", "nomem"]


@pytest.mark.parametrize("way", ["no cache", "cache", "gradients"])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits(name, way, golden) -> None:
    model = oncelm.load(golden / "longllama" / name, device="cpu")
    expected = load_file(golden / "longllama" / name / "expected.safetensors")
    positions, mask = expected["positions"], expected["padded_mask"]
    with torch.set_grad_enabled(way == "gradients"):
        options = {"use_cache": way == "cache", "logits_to_keep": positions}
        found = model(expected["input_ids"], **options).logits
        padded = model(expected["padded_input_ids"], attention_mask=mask, **options).logits
    torch.testing.assert_close(found, expected["logits_cached" if way == "cache" else "logits"], **close)
    real = mask[:, positions].bool()
    torch.testing.assert_close(padded[real], expected["padded_logits"][real], **close)


@pytest.mark.parametrize("memory", ["exact", "cpu", "disk"])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_greedy_continuations(name, memory, golden) -> None:
    """Long enough that the local cache moves to memory several times."""
    model = oncelm.load(golden / "longllama" / name, device="cpu")
    expected = load_file(golden / "longllama" / name / "expected.safetensors")
    prompt, continuation = expected["input_ids"], expected["continuation"]
    options = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    with quiet_transformers():
        output = model.generate(prompt, max_new_tokens=continuation.shape[1], memory=memory, **options)
    assert torch.equal(output.sequences[:, prompt.shape[1] :], continuation)
    found = torch.stack(output.logits, dim=1)  # what chose each token; recorded is what each token gave
    torch.testing.assert_close(found[:, 1:], expected["continuation_logits"][:, :-1], **close)


def test_checkpoints_of_the_hub(golden, tmp_path) -> None:
    source = golden / "longllama" / "base"
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {  # the hub's folders bring code, which is not run
        "AutoConfig": "configuration_longllama.LongLlamaConfig",
        "AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = oncelm.load(source, device="cpu").fingerprint()
    assert oncelm.load(tmp_path, device="cpu").fingerprint() == wanted
    assert LongLlamaForCausalLM.from_pretrained(tmp_path).fingerprint() == wanted
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LongLlamaForCausalLM


# -- windows ----------------------------------------------------------------------------------------------------------


def test_plan() -> None:
    def pieces(*arguments: Any) -> list[tuple]:
        return [(p.columns.start, p.columns.stop, p.spill_first, p.fate) for p in plan(*arguments)]

    assert pieces(5, 0, 16, 6, True) == [(0, 5, False, "local")]
    assert pieces(5, 0, 16, 6, False) == [(0, 5, False, "dropped")]
    assert pieces(40, 0, 16, 6, True) == [
        (0, 16, False, "memory"),
        (16, 32, False, "memory"),
        (32, 34, False, "memory"),
        (34, 40, False, "local"),
    ]
    assert pieces(1, 15, 16, 6, True) == [(0, 1, False, "local")]
    assert pieces(1, 16, 16, 6, True) == [(0, 1, True, "local")]
    assert pieces(20, 3, 16, 6, True) == [(0, 14, True, "local"), (14, 20, True, "local")]
    assert pieces(9, 3, 16, 6, True) == [(0, 3, False, "local"), (3, 9, False, "local")]


@settings(deadline=None, max_examples=25)
@given(T=st.integers(1, 70), data=st.data())
def test_some_logits_are_those_of_all(T, data) -> None:
    model, tokens = make_long(), ids(2, T)
    everything = logits(model, tokens)
    columns = torch.tensor(data.draw(st.lists(st.integers(-T, T - 1), min_size=1, max_size=8)))
    torch.testing.assert_close(logits(model, tokens, logits_to_keep=columns), everything[:, columns], **same)
    count = data.draw(st.integers(1, T))
    torch.testing.assert_close(logits(model, tokens, logits_to_keep=count), everything[:, -count:], **same)
    mask = torch.rand(2, T, generator=torch.Generator().manual_seed(T)) < 0.3
    torch.testing.assert_close(logits(model, tokens, logits_to_keep=mask), everything[mask], **same)


@pytest.mark.parametrize("T", [5, 16, 41])
def test_loss_is_that_of_the_logits(T) -> None:
    model, tokens = make_long(), ids(2, T)
    labels = tokens.clone()
    labels[0, : T // 2] = -100
    expected = torch.nn.functional.cross_entropy(logits(model, tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            loss = model(tokens, labels=labels).loss
        torch.testing.assert_close(loss.detach(), expected, **same)
    moved = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), dim=1)
    torch.testing.assert_close(model(tokens, targets=moved).loss.detach(), expected, **same)
    both = model(tokens, labels=labels, logits_to_keep=1)
    torch.testing.assert_close(both.logits.detach(), logits(model, tokens, logits_to_keep=1), **same)


@settings(deadline=None, max_examples=25)
@given(pads=st.lists(st.integers(0, 30), min_size=2, max_size=2), length=st.integers(31, 60), new=st.integers(1, 20))
def test_left_padding_is_never_seen(pads, length, new) -> None:
    """Whatever stands under it; with a cache too, whose memories then differ in length."""
    model, tokens = make_long(), ids(2, length + new)
    mask = torch.ones_like(tokens)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    other = torch.where(mask.bool(), tokens, ids(2, length + new, seed=1))
    found = []
    for given_ids in (tokens, other):
        cache = model.new_cache(2)
        first = logits(model, given_ids[:, :length], attention_mask=mask[:, :length], past_key_values=cache)
        second = logits(model, given_ids[:, length:], attention_mask=mask, past_key_values=cache)
        found.append(torch.cat((first, second), dim=1)[mask.bool()])
        assert cache.lengths == tuple(length + new - pad for pad in pads)
    assert torch.equal(*found)


def test_a_batch_is_its_rows_alone() -> None:
    model, tokens = make_long(), ids(3, 45)
    together = logits(model, tokens)
    for row in range(3):
        torch.testing.assert_close(logits(model, tokens[row : row + 1])[0], together[row], **same)


def test_prefill_is_forward() -> None:
    model, tokens = make_long(), ids(2, 47)
    seen: list[int] = []
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    cache = model.new_cache(2, 60)
    last = model.prefill(tokens, cache, attention_mask=mask, progress=seen.append)
    assert seen == [16, 32, 41, 47]
    torch.testing.assert_close(last, logits(model, tokens, attention_mask=mask)[:, -1], **same)
    again = model.new_cache(2)
    logits(model, tokens, attention_mask=mask, past_key_values=again)
    assert (cache.remembered, cache.local) == (again.remembered, again.local) == ((41, 32), (6, 6))
    step = ids(2, 3, seed=2)
    for a, b in ((logits(model, step, past_key_values=c) for c in pair) for pair in [(cache, again)]):
        torch.testing.assert_close(a, b, **same)


def test_last_context_length_says_what_stays_out_of_memory() -> None:
    model, tokens = make_long(), ids(1, 40)
    cache = model.new_cache(1)
    model(tokens, past_key_values=cache, last_context_length=9)
    assert (cache.remembered, cache.local) == ((31,), (9,))
    with quiet_transformers():
        output = model.generate(tokens, max_new_tokens=2, last_context_length=9, return_dict_in_generate=True)
    assert output.past_key_values.remembered == (31,)


def test_inputs_embeds() -> None:
    model, tokens = make_long(), ids(2, 40)
    with torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(tokens), use_cache=False).logits
    assert torch.equal(found, logits(model, tokens))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {}])
def test_generate(options) -> None:
    model, tokens = make_long(), ids(2, 23)
    with quiet_transformers():
        out = model.generate(tokens, max_new_tokens=30, eos_token_id=None, **options)
    assert out.shape == (2 * options.get("num_return_sequences", 1), 53)
    if not options:
        step = tokens
        cache = model.new_cache(2)
        for _ in range(30):
            chosen = logits(model, step, past_key_values=cache)[:, -1].argmax(-1, keepdim=True)
            tokens, step = torch.cat((tokens, chosen), dim=1), chosen
        assert torch.equal(out, tokens)


# -- other folders ----------------------------------------------------------------------------------------------------

ROPE = {"factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", **ROPE}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "tied, wide heads": {"tie_word_embeddings": True, "head_dim": 12, "num_key_value_heads": 4},
}


def make_llama(**changes: Any) -> LlamaForCausalLM:
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48, **changes}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", LLAMAS)
def test_a_llama_folder_becomes_a_longllama_and_stays_a_llama(kind, tmp_path) -> None:
    llama, tokens = make_llama(**LLAMAS[kind]), ids(2, 48)
    llama.save_pretrained(tmp_path / "llama")
    loaded = oncelm.load(tmp_path / "llama", device="cpu", mem_layers=[1], last_context_length=48)
    assert isinstance(loaded, LongLlamaForCausalLM)
    torch.testing.assert_close(logits(loaded, tokens), logits(llama, tokens), **same)
    by_class = LongLlamaForCausalLM.from_pretrained(tmp_path / "llama", mem_layers=[1])
    assert by_class.fingerprint() == loaded.fingerprint()

    loaded.save_pretrained(tmp_path / "long")
    with quiet_transformers():
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "long").eval()
        auto = AutoModelForCausalLM.from_pretrained(tmp_path / "long").eval()
    assert torch.equal(logits(plain, tokens), logits(llama, tokens))
    assert isinstance(auto, LongLlamaForCausalLM)
    assert torch.equal(logits(auto, tokens), logits(loaded, tokens))


def test_memory_reaches_where_a_window_does_not(tmp_path) -> None:
    """With memory, the first token matters to the last logits; without, the windows are alone."""
    make_llama().save_pretrained(tmp_path)
    tokens = ids(1, 60)
    changed = tokens.clone()
    changed[0, 0] = tokens[0, 0] % (VOCAB - 1) + 1
    for mem_layers, reaches in (([1], True), ([], False)):
        model = oncelm.load(tmp_path, mem_layers=mem_layers, max_position_embeddings=16)
        assert torch.equal(*(logits(model, x, logits_to_keep=1) for x in (tokens, changed))) != reaches


# -- training ---------------------------------------------------------------------------------------------------------


def gradients(model: LongLlamaForCausalLM, tokens: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, **options).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"cross_batch_range": 2, "dataset_packing": 2}], ids=["windows", "crossbatch"])
def test_gradient_checkpointing_changes_nothing(options) -> None:
    model, tokens = make_long(), ids(4, 16 if options else 41)
    model.train()
    expected = gradients(model, tokens, **options)
    model.gradient_checkpointing_enable()
    for found, wanted in zip(gradients(model, tokens, **options), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("mode", ["train", "eval", "cache", "crossbatch"])
@pytest.mark.parametrize("mem_dtype", [None, "int8"])
def test_under_autocast(mode, mem_dtype) -> None:
    """As the trainer runs it in bfloat16: windows, memory and evaluation too."""
    model, tokens = make_long(mem_dtype=mem_dtype), ids(2, 16 if mode == "crossbatch" else 41)
    options = {"cross_batch_range": 1} if mode == "crossbatch" else {}
    expected = model(tokens, use_cache=False, **options).logits.detach()
    gradients_on = mode in ("train", "crossbatch")
    with torch.set_grad_enabled(gradients_on), torch.autocast("cpu", torch.bfloat16):
        found = model(tokens, use_cache=mode == "cache", **options).logits
    torch.testing.assert_close(found.detach().float(), expected, rtol=0.1, atol=0.6)


def test_gradients_reach_through_memory() -> None:
    model, tokens = make_long(), ids(1, 40)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits[:, -1].sum().backward()
    assert (embeddings.grad[0, :16].abs().sum(-1) > 0).all()  # two windows back


def test_crossbatch_rows_see_the_rows_before_them() -> None:
    model = make_long(mem_layers=[1], cross_batch_range=3, cross_batch_stepping=True, dataset_packing=4).train()
    tokens = ids(8, 12)
    changed = tokens.clone()
    changed[3] = ids(1, 12, seed=5)
    differs = (model(tokens, use_cache=False).logits != model(changed, use_cache=False).logits).flatten(1).any(1)
    assert differs.tolist() == [False, False, False, True, False, True, True, False]  # ranges 0 2 3 3
    model.eval()  # the configuration's crossbatch is for training
    differs = (logits(model, tokens) != logits(model, changed)).flatten(1).any(1)
    assert differs.tolist() == [False, False, False, True, False, False, False, False]


def test_crossbatch_of_one_document_is_memory() -> None:
    """Row i sees rows 0..i-1 whole, as a window sees memory."""
    model, tokens = make_long(), ids(1, 32)
    rows = logits(model, tokens.view(2, 16), cross_batch_range=1, dataset_packing=2)
    cache = model.new_cache(1)
    model(tokens[:, :16], past_key_values=cache, last_context_length=16)
    cache.spill()
    second = logits(model, tokens[:, 16:], past_key_values=cache, last_context_length=16)
    torch.testing.assert_close(rows[1:], second, **same)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mem_layers": [3]}, r"mem_layers must be layers of the model, 0\.\.2, got \[3\]"),
        ({"mem_layers": [-1]}, r"0\.\.2, got \[-1\]"),
        ({"mem_layers": [1, 1]}, "must not repeat a layer"),
        ({"mem_layers": ["a", 1]}, r"0\.\.2, got \['a', 1\]"),
        ({"mem_layers": 2}, r"mem_layers must be a list of layers, .* got 2"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a whole number of at least 1, got 0"),
        ({"mem_dtype": "bfloat61"}, "unknown mem_dtype 'bfloat61'; did you mean 'bfloat16'"),
        ({"mem_attention_grouping": [0, 4]}, r"mem_attention_grouping must be \(heads, queries\), .* got \[0, 4\]"),
        ({"mem_attention_grouping": 3}, r"mem_attention_grouping must be \(heads, queries\), .*\[4, 2048\].* got 3"),
        ({"mem_attention_grouping": [3]}, r"two whole numbers of at least 1, .* got \[3\]"),
        ({"mem_attention_grouping": "64"}, r"two whole numbers of at least 1, .* got '64'"),
        ({"mem_attention_grouping": [1.5, 2]}, r"two whole numbers of at least 1, .* got \[1\.5, 2\]"),
        ({"mem_attention_grouping": [True, 2]}, r"two whole numbers of at least 1, .* got \[True, 2\]"),
        ({"last_context_length": 17}, "last_context_length must be from 1 to max_position_embeddings = 16"),
        ({"last_context_length": 0}, "last_context_length must be a whole number of at least 1, got 0"),
        ({"last_context_length": "x"}, "last_context_length must be a whole number of at least 1, got 'x'"),
        ({"mem_layer": [1]}, "unknown LongLlamaConfig key 'mem_layer'; did you mean 'mem_layers'"),
        ({"cross_batch_range": -1}, "cross_batch_range must be a whole number of at least 0, got -1"),
        ({"cross_batch_range": [3]}, r"cross_batch_range must be a whole number of at least 0, got \[3\]"),
        ({"dataset_packing": 1.5}, r"dataset_packing must be a whole number of at least 1, got 1\.5"),
        ({"last_context_length": 8.0}, r"last_context_length must be a whole number of at least 1, got 8\.0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number of at least 1, got 0"),
        ({"hidden_act": "sliu"}, "unknown hidden_act 'sliu'; did you mean 'silu'"),
        ({"mem_positionals": "false"}, "mem_positionals must be true or false, got 'false'"),
        ({"cross_batch_stepping": 1}, "cross_batch_stepping must be true or false, got 1"),
        ({"attention_dropout": 0.1}, "attention_dropout is not offered"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ],
)
def test_a_bad_config_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_long(**changes)


def test_memory_layers_are_the_checkpoints(tmp_path) -> None:
    make_long().save_pretrained(tmp_path)
    turned = oncelm.load(tmp_path, mem_layers=[2, 1])
    assert turned.config.mem_layers == [1, 2]
    assert turned.fingerprint() == make_long(mem_layers=[2, 1]).fingerprint() == make_long().fingerprint()
    for wrong in (2, "12"):
        with pytest.raises(ValueError, match="mem_layers must be a list of layers"):
            oncelm.load(tmp_path, mem_layers=wrong)
    for load in (oncelm.load, LongLlamaForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError, match=r"mem_layers \[0\] are not the checkpoint's, which was trained with \[1, 2\]"
        ):
            load(tmp_path, mem_layers=[0])
    with pytest.raises(ValueError, match="did you mean 'mem_layers'"):
        oncelm.load(tmp_path, mem_layer=[0])


def test_overrides_are_for_llamas(tmp_path) -> None:
    make_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"mem_dtype cannot be changed\. With mem_layers it is read as a LongLLaMA"):
        oncelm.load(tmp_path / "llama", mem_dtype="float32")
    make_model("retention").save_pretrained(tmp_path / "yoco")
    with pytest.raises(ValueError, match="model of type oncelm_yoco; mem_layers is a key of LongLLaMA models"):
        oncelm.load(tmp_path / "yoco", mem_layers=[1])
    config = json.loads((tmp_path / "llama" / "config.json").read_text()) | {"some_other_key": 3}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    assert oncelm.load(tmp_path / "llama", mem_layers=[1]).config.mem_layers == [1]  # a LLaMA folder may have any keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_batch_range": -1}, "cross_batch_range must be a whole number of at least 0"),
        ({"last_context_length": "9"}, "last_context_length must be a whole number of at least 1, got '9'"),
        ({"cross_batch_range": 1, "dataset_packing": 3}, "batch of 4 is not divisible by dataset_packing 3"),
        (
            {"cross_batch_range": 1, "attention_mask": torch.tensor([[0] + [1] * 9] * 4)},
            "crossbatch takes full rows only",
        ),
        ({"cross_batch_range": 1, "past_key_values": "cache"}, "it goes without past_key_values"),
        ({"last_context_length": 17}, "last_context_length must be from 1 to the window of 16"),
        ({"memory": "exakt", "use_cache": True}, "did you mean 'exact'"),
        ({"memory": "exakt", "past_key_values": "cache"}, "did you mean 'exact'"),
        ({"output_attentions": True}, "output_attentions=True is not offered"),
        ({"input_ids": torch.ones(4, 5)}, r"input_ids must be \[B, T\] integers"),
        ({"input_ids": torch.full((4, 5), VOCAB)}, r"input_ids has 61; allowed: 0\.\.60"),
        ({"past_key_values": torch.ones(1)}, "must be a cache of this model"),
    ],
)
def test_bad_input(options, message) -> None:
    model = make_long()
    if options.get("past_key_values") == "cache":
        options = options | {"past_key_values": model.new_cache(4)}
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": ids(4, 10), **options})


def test_crossbatch_needs_memory_layers_and_fits_a_window() -> None:
    with pytest.raises(ValueError, match="mem_layers is empty"):
        make_long(mem_layers=[])(ids(4, 10), cross_batch_range=1)
    with pytest.raises(ValueError, match="one context: at most 16 tokens"):
        make_long()(ids(4, 17), cross_batch_range=1)


def test_a_cache_handed_back_for_another_batch_or_model() -> None:
    model = make_long()
    cache = model.new_cache(2)
    model(ids(2, 30), past_key_values=cache)
    before = cache.lengths
    with pytest.raises(ValueError, match="the cache is for a batch of 2, the input is a batch of 3"):
        model(ids(3, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="it belongs to another model"):
        make_long(num_hidden_layers=4)(ids(2, 4), past_key_values=cache)
    assert cache.lengths == before
    model(ids(2, 4), past_key_values=cache)  # nothing happened to it


def test_files_with_wrong_tensors(tmp_path) -> None:
    make_long().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing tensors: model\.norm\.weight"):
        LongLlamaForCausalLM.from_pretrained(tmp_path)


def test_config_round_trip() -> None:
    config = LongLlamaConfig(mem_layers=(6, 12, 18), mem_attention_grouping=(4, 2048))
    assert config.last_context_length == 1024
    again = LongLlamaConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert Path(again.model_type).name == "longllama"
