"""Each method of a session gives what a plain forward pass over the whole text gives."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from oncelm.models.session import Session, open_session
from oncelm.models.session import transformers_cache as module
from tests.models.small import VOCAB, make_long, make_model

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3,
}  # fmt: skip
KINDS = ("retention", "window", "longllama", "llama", "mistral")
BRANCHING = ("retention", "window", "llama")


@functools.cache
def model_of(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    if kind == "mistral":  # a sliding window: its cache cannot be cropped
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9)).eval()
    if kind == "longllama":  # texts as short as these do not move to memory, wherever they are cut
        return make_long(max_position_embeddings=64, last_context_length=60)
    return make_model(kind)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full(kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of a text [T]."""
    return model_of(kind)(ids[None], use_cache=False).logits[0]


def same(got: torch.Tensor, *expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-4, rtol=2e-4)


def opened(kind: str, rows: int = 1, room: int | None = 50, **options) -> Session:
    return open_session(model_of(kind), rows, room, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_read_and_step(kind, monkeypatch) -> None:
    monkeypatch.setattr(module, "READ_AT_ONCE", 7)
    ids = draw(3, 30)
    session, told = opened(kind, 3), []
    same(session.read(ids[:, :20], told.append), *(full(kind, row[:20])[-1] for row in ids))
    assert told[-1] == session.num_tokens == 20
    same(session.read(ids[:, 20:25]), *(full(kind, row[:25])[-1] for row in ids))
    for end in range(26, 31):
        same(session.step(ids[:, end - 1 : end]), *(full(kind, row[:end])[-1] for row in ids))
    assert session.num_tokens == 30
    assert session.nbytes() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_score_of_one_text_in_parts(kind) -> None:
    ids = draw(40)
    session = opened(kind)
    got = [session.score([ids[a:b]]) for a, b in ((0, 1), (1, 17), (17, 40))]
    same(torch.cat(got), *full(kind, ids))


@pytest.mark.parametrize("kind", BRANCHING)
def test_score_of_texts_that_branch(kind) -> None:
    """A beginning, repeated; rows of different lengths behind it, and behind those; then one token each."""
    start, ends, more = draw(8), [draw(n, seed=n) for n in (3, 7, 1)], [draw(n, seed=20 + n) for n in (2, 4, 5)]
    session = opened(kind)
    assert session.branches
    wanted = torch.zeros(8, dtype=torch.bool)
    wanted[[2, 7]] = True
    expected = full(kind, start)
    same(session.score([start], wanted), expected[2], expected[7])
    session.select([0, 0, 0])
    assert session.rows == 3
    wanted = torch.rand(11, generator=torch.Generator().manual_seed(0)) < 0.5
    texts = [torch.cat((start, end)) for end in ends]
    expected = torch.cat([full(kind, text)[8:] for text in texts])
    same(session.score(ends, wanted), *expected[wanted])
    session.select([2, 0, 1])
    texts = [torch.cat((texts[row], text)) for row, text in zip((2, 0, 1), more, strict=True)]
    same(session.score(more), *(full(kind, text)[-len(m) + i] for text, m in zip(texts, more, strict=True)
                               for i in range(len(m))))  # fmt: skip
    assert session.num_tokens == max(map(len, texts))
    tokens = draw(3, 1)
    texts = [torch.cat((text, token)) for text, token in zip(texts, tokens, strict=True)]
    same(session.step(tokens), *(full(kind, text)[-1] for text in texts))
    session.start(2, 20)
    same(session.read(torch.stack((start, start.flip(0)))), full(kind, start)[-1], full(kind, start.flip(0))[-1])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BRANCHING])
def test_whole_texts_where_rows_do_not_branch(kind) -> None:
    session, texts = opened(kind, 3), [draw(n, seed=n) for n in (5, 19, 12)]
    assert not session.branches
    assert session.bytes_of(100) == 0
    wanted = torch.rand(36, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = torch.cat([full(kind, text) for text in texts])
    for _ in range(2):  # nothing is left behind
        same(session.score(texts, wanted), *expected[wanted])
    session.read(draw(3, 4))
    with pytest.raises(ValueError, match="scores rows of whole texts only"):
        session.score(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_marks_and_another_text(kind) -> None:
    start, middle, *ends = (draw(2, 10, seed=seed) for seed in range(4))
    session = opened(kind, 2)
    session.read(start)
    early = session.mark()
    session.read(middle)
    late = session.mark()
    for mark, before in ((late, [start, middle]), (late, [start, middle]), (early, [start]), (early, [start])):
        for end in ends:
            session.rewind(mark)
            same(session.read(end), *(full(kind, row)[-1] for row in torch.cat((*before, end), 1)))
    session.reset()
    assert session.num_tokens == 0
    same(session.read(middle), *(full(kind, row)[-1] for row in middle))
    session.free()
    assert session.nbytes() == 0


@pytest.mark.parametrize("kind", ["retention", "llama"])
def test_a_mark_before_anything_is_read(kind) -> None:
    session, ids = opened(kind), draw(1, 9)
    mark = session.mark()
    for _ in range(2):
        same(session.read(ids), full(kind, ids[0])[-1])
        session.rewind(mark)
    assert session.num_tokens == 0


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_goes_on_from_what_was_read(kind, read) -> None:
    ids = draw(1, 12)
    session, row = opened(kind), ids[0]
    for _ in range(6):
        row = torch.cat((row, full(kind, row)[-1:].argmax(-1)))
    if read:
        session.read(ids[:, :-1])
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert session.generate(ids, **greedy)[0].tolist() == row.tolist()
    if read:  # and from its last token alone
        session = opened(kind)
        session.read(ids[:, :-1])
        assert session.generate(ids[:, -1:], **greedy)[0, 1:].tolist() == row[12:].tolist()


def test_options_go_where_they_belong() -> None:
    session = opened("longllama", cache_options={"memory": "cpu", "dtype": torch.int8})
    session.read(draw(1, 9))
    assert session.cache.snapshot().kv_dtype == torch.int8
    long, ids = make_long(), draw(1, 40)
    found = {}
    for local in (4, 12):
        session = open_session(long, read_options={"last_context_length": local})
        found[local] = session.read(ids)
        torch.testing.assert_close(found[local], long.prefill(ids, long.new_cache(), last_context_length=local))
    assert not torch.equal(found[4], found[12])
    assert opened("longllama", read_options={"last_context_length": 7}).longest == 7
    assert opened("retention", chunk_size=3).read(draw(1, 9)).shape == (1, VOCAB)
    with pytest.raises(ValueError, match="chunk_size is not for LongLLaMA models"):
        opened("longllama", chunk_size=3)
    for kind, options in (
        ("llama", {"cache_options": {"memory": "cpu"}}),
        ("retention", {"read_options": {"memory": 1}}),
    ):
        with pytest.raises(ValueError, match=r"memory is (for LongLLaMA models|no option of a session); this is a"):
            opened(kind, **options)


@pytest.mark.parametrize("kind", ["retention", "llama"])
def test_there_is_room_for_so_much(kind) -> None:
    session = opened(kind, room=10)
    session.read(draw(1, 8))
    with pytest.raises(ValueError, match=r"10 tokens .*has 8; 3 more"):
        session.read(draw(1, 3))


@pytest.mark.parametrize("kind", ["retention", "llama"])
def test_what_a_session_cannot_do_is_refused(kind) -> None:
    session = opened(kind)
    with pytest.raises(ValueError, match="this session has read nothing yet"):
        session.select([0, 0])
    for ids in (draw(2, 3), draw(3), draw(1, 0)):
        with pytest.raises(ValueError, match=r"a session of 1 rows takes|the cache is for a batch of 1|input_ids"):
            session.read(ids)
    session.read(draw(1, 8))
    early = session.mark()
    session.read(draw(1, 8))
    late = session.mark()
    session.rewind(early)
    with pytest.raises(ValueError, match=r"this (mark is behind 16 tokens|rewind point)"):
        session.rewind(late)
    same(session.read(draw(1, 4)), full(kind, torch.cat((draw(1, 8), draw(1, 4)), 1)[0])[-1])
