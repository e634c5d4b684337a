"""`LLM`: prompts in, answers out."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from oncelm.data.tokenizers import load_tokenizer
from oncelm.engine.beam import BeamSearchParams
from oncelm.engine.llm import LLM
from oncelm.engine.params import SamplingParams
from oncelm.engine.thread import EngineStopped
from tests.models.small import make_model

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
TEXTS = ["It was", "a dark and stormy", "night"]


def make_llm(tokenizer: Any = "bytes", **options: Any) -> LLM:
    model = make_model("retention", vocab_size=260)
    options = {
        "max_model_len": 128,
        "max_num_seqs": 2,
        "page_size": 8,
        "kv_cache_bytes": 2**22,
        "verbose": False,
    } | options
    return LLM(model, tokenizer, **options)


def test_prompts_of_every_form() -> None:
    llm, tokenizer = make_llm(), load_tokenizer("bytes")
    ids = [tokenizer(text).input_ids for text in TEXTS]
    answers = [output.outputs[0].token_ids for output in llm.generate(TEXTS, GREEDY, use_tqdm=False)]
    assert [len(tokens) for tokens in answers] == [6, 6, 6]
    mixed = [ids[0], {"prompt_token_ids": ids[1]}, {"prompt": TEXTS[2]}]
    for prompts in (ids, mixed):
        outputs = llm.generate(prompts, [GREEDY] * 3, use_tqdm=False, priority=[2, 1, 0])
        assert [output.outputs[0].token_ids for output in outputs] == answers
        assert [output.prompt_token_ids for output in outputs] == ids
    assert outputs[2].prompt == TEXTS[2]
    assert outputs[0].outputs[0].text == tokenizer.decode([*ids[0], *answers[0]])[len(TEXTS[0]) :]
    for prompt in (TEXTS[0], ids[0], list(np.array(ids[0])), mixed[1]):
        assert len(llm.generate(prompt, GREEDY, use_tqdm=False)) == 1
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_progress(capsys) -> None:
    make_llm().generate(TEXTS, GREEDY)
    assert "3/3" in capsys.readouterr().err


def test_a_refused_prompt_leaves_nothing_behind() -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate(["text", ""], GREEDY)
    with pytest.raises(ValueError, match="sampling_params: 2 for 3 prompts"):
        llm.generate(TEXTS, [GREEDY] * 2)
    with pytest.raises(ValueError, match="prompts must be text"):
        llm.generate(7, GREEDY)
    for odd in ({"temperature": 0}, BeamSearchParams()):
        with pytest.raises(ValueError, match="sampling_params must be a SamplingParams, got"):
            llm.generate(TEXTS, odd)
        with pytest.raises(ValueError, match="sampling_params must be a SamplingParams, got"):
            next(llm.stream(TEXTS[0], odd))
    with pytest.raises(ValueError, match="params must be a BeamSearchParams, got"):
        llm.beam_search(TEXTS, GREEDY)
    with pytest.raises(ValueError, match="sampling_params: 0 for 3 prompts"):
        llm.generate(TEXTS, [])
    with pytest.raises(ValueError, match="cache_salt must be text, got 5"):
        llm.generate(TEXTS, GREEDY, cache_salt=5)
    assert len(llm.generate(TEXTS, GREEDY, use_tqdm=False)) == 3
    assert not llm._open
    assert not llm._news


def test_an_interrupted_call_leaves_nothing_behind(monkeypatch) -> None:
    llm = make_llm()
    step, count = llm.engine.step, 0

    def interrupted() -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS, GREEDY, use_tqdm=False)
    assert len(llm.generate(TEXTS, GREEDY, use_tqdm=False)) == 3
    llm.close()
    assert llm.engine.pages.num_used == 0


def test_a_stream_and_other_calls_beside_it() -> None:
    llm = make_llm()
    expected = llm.generate(TEXTS[0], GREEDY, use_tqdm=False)[0].outputs[0]
    texts = []
    for output in llm.stream(TEXTS[0], GREEDY):
        texts.append(output.outputs[0].text)
        assert len(llm.generate(TEXTS[1:], GREEDY, use_tqdm=False)) == 2
    assert texts[-1] == expected.text
    assert texts == sorted(texts, key=len)
    stream = llm.stream(TEXTS[1], GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.scheduler.has_unfinished


def test_outputs_of_a_stream() -> None:
    """Each is as far as the answer had come, what is new, or the last one."""
    llm = make_llm()
    outputs = [output.outputs[0] for output in llm.stream(TEXTS[0], GREEDY)]
    assert [len(answer.token_ids) for answer in outputs] == [1, 2, 3, 4, 5, 6]
    assert [answer.finish_reason for answer in outputs] == [None] * 5 + ["length"]
    new = [output.outputs[0] for output in llm.stream(TEXTS[0], replace(GREEDY, output_kind="delta"))]
    assert [token for answer in new for token in answer.token_ids] == outputs[-1].token_ids
    assert "".join(answer.text for answer in new) == outputs[-1].text
    (last,) = llm.stream(TEXTS[0], replace(GREEDY, output_kind="final_only"))
    assert last.finished
    assert last.outputs[0].token_ids == outputs[-1].token_ids


def test_several_threads() -> None:
    llm, answers = make_llm(), dict[int, Any]()
    expected = [output.outputs[0].token_ids for output in llm.generate(TEXTS, GREEDY, use_tqdm=False)]

    def work(number: int) -> None:
        if number % 2:
            answers[number] = [[*llm.stream(text, GREEDY)][-1].outputs[0].token_ids for text in TEXTS]
        else:
            outputs = llm.generate(TEXTS, GREEDY, use_tqdm=False)
            answers[number] = [output.outputs[0].token_ids for output in outputs]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == dict.fromkeys(range(4), expected)
    assert not llm._open
    assert not llm._news


def test_a_stream_that_is_given_up_within_a_step(monkeypatch) -> None:
    """As where Python collects an iterator that nobody has any more, which it does at any moment."""
    llm = make_llm(enable_prefix_caching=False)
    stream = llm.stream(TEXTS[0], GREEDY)
    next(stream)
    memory = llm.engine.memory
    reserve = memory.reserve

    def collected(request: Any, num_tokens: int) -> bool:
        if request.request_id == "0":
            stream.close()
        return reserve(request, num_tokens)

    monkeypatch.setattr(memory, "reserve", collected)
    (output,) = llm.generate(TEXTS[1], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 6
    assert llm.metrics().counts.finished == {"abort": 1, "length": 1}
    assert llm.engine.pages.num_used == llm.engine.slots.num_used == 0


def test_a_document_that_was_not_read_to_its_end() -> None:
    llm = make_llm(max_num_batched_tokens=4)
    with pytest.raises(EngineStopped, match="before the document was read"):
        llm.read("All happy families are alike", lambda done: llm.close())


def test_closed() -> None:
    """The memory is free though the object is still there, as the last one is where a notebook makes another."""
    llm = make_llm()
    llm.generate(TEXTS, GREEDY, use_tqdm=False)
    tensors = [weakref.ref(tensor) for tensor in llm.engine.pool._of_pages.values()]
    llm.close()
    llm.close()
    gc.collect()
    assert tensors
    assert not any(tensor() is not None for tensor in tensors)
    assert llm.engine.pool.nbytes() == 0
    assert llm.metrics().counts.finished == {"length": 3}
    for ask in (lambda: llm.generate(TEXTS[0], GREEDY), lambda: llm.read(TEXTS[0])):
        with pytest.raises(EngineStopped, match="was closed"):
            ask()


def test_a_document_and_questions() -> None:
    llm, seen = make_llm(max_num_batched_tokens=16), []
    document = "All happy families are alike; every unhappy family is unhappy in its own way. "
    count = llm.read(document, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == count == len(document)
    outputs = llm.generate([document + "Who?", document + "Why?"], GREEDY, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [count, count]


def test_conversations() -> None:
    llm = make_llm()
    turn = [{"role": "user", "content": "Hi"}]
    (output,) = llm.chat(turn, GREEDY, use_tqdm=False)
    assert llm.tokenizer.decode(output.prompt_token_ids) == "User:\nHi\n\nAssistant:\n"
    outputs = llm.chat([turn, [*turn, {"role": "assistant", "content": "Ho"}, *turn]], GREEDY, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [6, 6]
    llm.tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}<s>"
    (output,) = llm.chat([{"role": "user", "content": "</s>"}], GREEDY, use_tqdm=False)
    assert output.prompt_token_ids[0] == output.prompt_token_ids[-1] == llm.tokenizer.bos_token_id
    assert output.prompt_token_ids.count(llm.tokenizer.eos_token_id) == 1  # the template's; what was typed is text
    with pytest.raises(ValueError, match="role 'robot'"):
        llm.chat([{"role": "robot", "content": "Hi"}])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_llm(tokenizer=None).chat(turn)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="did you mean 'max_num_seqs'"):
        make_llm(max_num_seq=3)
    with pytest.raises(ValueError, match="max_num_seqs must be a whole number of at least 1, got 0"):
        make_llm(max_num_seqs=0)
    with pytest.raises(ValueError, match=r"kv_cache_dtype.* did you mean 'float8'"):
        make_llm(kv_cache_dtype="float9")
    with pytest.raises(ValueError, match="did you mean 'num_tokens'"):
        make_llm(speculative={"method": "prompt_lookup", "num_token": 3})
    with pytest.raises(ValueError, match="less than max_num_seqs"):
        make_llm(max_num_batched_tokens=1)
    with pytest.raises(ValueError, match="device and dtype are for a model that is loaded"):
        LLM(make_model("retention"), device="cpu")
    for model in (7, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="model must be a folder, a hub id or a model"):
            LLM(model)
    with pytest.raises(ValueError, match="tokenizer must be a name, a folder or a tokenizer"):
        make_llm(tokenizer=7)
    with pytest.raises(ValueError, match=r"'yoco-tiny' is a preset.*build_model"):
        LLM("yoco-tiny")


def test_folders_that_are_not_there(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache_dir=.* is no folder, and cannot be made one"):
        make_llm(cache_dir=tmp_path / "file" / "kept")
    with pytest.raises(FileNotFoundError, match="absent"):
        LLM(tmp_path / "absent")


def test_a_folder(tmp_path) -> None:
    make_model("retention", vocab_size=260).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer=\.\.\."):
        LLM(tmp_path, device="cpu")
    load_tokenizer("bytes").save_pretrained(tmp_path)
    with LLM(tmp_path, device="cpu", kv_cache_bytes=2**24, max_model_len=64, verbose=False) as llm:
        assert len(llm.generate("It was", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6
        assert llm.metrics().counts.finished == {"length": 1}
