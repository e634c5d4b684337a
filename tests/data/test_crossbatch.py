"""Batches of documents: every token in order, lane by lane, and the same for the same step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.data.crossbatch import DocumentBatches, documents_of
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import prepare
from oncelm.data.tokenizers import load_tokenizer
from oncelm.data.tokens import open_tokens


def make_documents(lengths: list[int]) -> list[np.ndarray]:
    """Document d's tokens say which document and which place: 1000 d + i."""
    return [1000 * d + np.arange(length, dtype=np.uint32) for d, length in enumerate(lengths)]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    seq_len=st.integers(2, 9),
    packing=st.integers(1, 4),
    lanes=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_lanes_are_documents_one_after_the_other(lengths, seq_len, packing, lanes, seed) -> None:
    data = DocumentBatches(make_documents(lengths), seq_len, packing, seed=seed)
    batches = [data.batch(step, packing * lanes) for step in range(6)]
    for lane in range(lanes):
        rows = torch.cat([batch[lane * packing : (lane + 1) * packing] for batch in batches])
        assert torch.equal(rows[1:, 0], rows[:-1, -1])  # rows overlap by one token
        stream = torch.cat((rows[:1, 0], rows[:, 1:].flatten()))
        place = stream % 1000
        document = stream // 1000
        for i in range(1, len(stream)):  # the next token of the same document, or the first of another
            ended = place[i - 1] == lengths[document[i - 1]] - 1
            assert place[i] == (0 if ended else place[i - 1] + 1)
            assert ended or document[i] == document[i - 1]


def test_a_step_depends_on_its_number_alone() -> None:
    documents = make_documents([50, 3, 80, 20, 9])
    steps = [3, 0, 40, 7]
    one = DocumentBatches(documents, 6, 2, seed=1)
    expected = [one.batch(step, 4) for step in sorted(steps)]
    for step, batch in zip(sorted(steps), expected, strict=True):
        assert torch.equal(DocumentBatches(documents, 6, 2, seed=1).batch(step, 4), batch)
        one.batch(step, 2)  # another batch size in between
        assert torch.equal(one.batch(step, 4), batch)
    assert not torch.equal(DocumentBatches(documents, 6, 2, seed=2).batch(0, 4), expected[0])
    for rows in (slice(0, 2), slice(1, 4), slice(2, 3), slice(4)):
        assert torch.equal(one.batch(0, 4, rows), expected[0][rows])


def test_documents_of_prepared_tokens(tmp_path) -> None:
    texts = [f"Document {number}. " * (number + 1) for number in range(4)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    tokenizer = load_tokenizer("bytes")
    folder = prepare(find_corpus(tmp_path), tokenizer, tmp_path / "tokens")
    found = [document for source in open_tokens(folder).train for document in documents_of(source.stream)]
    assert [tokenizer.decode(document, skip_special_tokens=True) for document in found] == texts
    assert all(document[-1] == tokenizer.eos_token_id for document in found)


def test_an_epoch_gives_each_document_once() -> None:
    data = DocumentBatches(make_documents([30, 30, 30, 30]), 6, 1)
    seen = torch.cat([data.batch(step, 1)[:, 1:] for step in range(23)]).flatten()
    assert sorted((seen[seen % 1000 == 29] // 1000).tolist()) == [0, 1, 2]


def test_held_out_and_short_documents() -> None:
    data = DocumentBatches(make_documents([30, 2, 30, 17]), 6, 2, min_tokens=10, held_out=1)
    seen = {int(token) // 1000 for step in range(20) for token in data.batch(step, 2).flatten()}
    assert seen == {0, 2}
    rows = torch.cat(list(data.validation_batches(2)))
    assert rows[:, 0].tolist() == [3000, 3005, 3010]
    assert [len(batch) for batch in data.validation_batches(2)] == [2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"packing": 0}, "packing must be at least 1"),
        ({"min_tokens": 100}, "has min_tokens = 100 tokens"),
        ({"held_out": 3}, "held_out must be from 0 to the 2 documents"),
    ],
)
def test_mistakes(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentBatches(make_documents([20, 30]), **{"seq_len": 5, "packing": 2, **change})
    with pytest.raises(ValueError, match="a batch of 3 is not divisible by packing 2"):
        DocumentBatches(make_documents([20, 30]), 5, 2).batch(0, 3)
