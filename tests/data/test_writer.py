"""Shards are the same however many threads encode, and whichever of them is done first."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.data import encoding, writer
from oncelm.data.encoding import Encoder
from oncelm.data.reading import DamagedText, Document
from oncelm.data.tokenizers import load_tokenizer
from oncelm.data.writer import ShardWriter

SHORT = st.text("ab \n", min_size=1, max_size=30).map(lambda text: [text])
LONG = st.lists(st.text("ab \n", min_size=1, max_size=80), min_size=2, max_size=8)
TOKENIZER = load_tokenizer("bytes")


class Uneven(Encoder):
    """Whose first calls take longest."""

    calls = 0

    def encode(self, texts):
        type(self).calls += 1
        time.sleep(0.002 / type(self).calls)
        return super().encode(texts)


def parts_of(parts: list[str], damaged: bool):
    yield from parts
    if damaged:
        raise DamagedText("not UTF-8 text: byte 0xff at offset 3")


def written(documents, bos: bool, threads: int, ahead: int) -> tuple[list[int], list[int], ShardWriter, list[bool]]:
    tokens, borders = io.BytesIO(), io.BytesIO()
    with ThreadPoolExecutor(threads) as pool:
        made = ShardWriter(tokens, borders, Uneven(TOKENIZER), bos=bos, pool=pool, ahead=lambda: ahead)
        refused = [made.add(Document(1, parts_of(*one))) is not None for one in documents]
        made.finish()
    ids = np.frombuffer(tokens.getvalue(), made._dtype).tolist()
    return ids, np.frombuffer(borders.getvalue(), "<i8").tolist(), made, refused


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.one_of(SHORT, LONG), st.booleans()), max_size=12), st.booleans(), st.integers(1, 5))
def test_documents_come_out_in_order(documents, bos: bool, ahead: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "BATCH_CHARACTERS", 50)
        patch.setattr(writer, "LONG_TEXT", 60)
        patch.setattr(encoding, "LONG_TEXT", 60)
        patch.setattr(encoding, "PIECE_CHARACTERS", 10)
        patch.setattr(encoding, "_WINDOW", 4)
        Uneven.calls = 0
        ids, borders, made, refused = written(documents, bos, threads=3, ahead=ahead)
    assert refused == [damaged for _, damaged in documents]
    head = [TOKENIZER.bos_token_id] if bos else []
    whole = [
        [*head, *TOKENIZER("".join(parts), add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
        for parts, damaged in documents
        if not damaged
    ]
    assert ids == [token for one in whole for token in one]
    assert borders == np.cumsum([len(one) for one in whole]).tolist()
    assert (made.num_documents, made.num_tokens) == (len(whole), len(ids))
    assert made.longest == max(map(len, whole), default=0)
    assert made.largest_id >= max(ids, default=0)  # what was taken back may count
    assert made.largest_id < TOKENIZER.vocab_size


def test_one_file_is_encoded_by_all_threads(monkeypatch) -> None:
    """A barrier that three threads must reach together: one after the other they never would."""
    together = threading.Barrier(3, timeout=30)

    class Waits(Encoder):
        def encode(self, texts):
            if texts[0].startswith("x"):
                together.wait()
            return super().encode(texts)

    monkeypatch.setattr(writer, "BATCH_CHARACTERS", 1)
    tokens, borders = io.BytesIO(), io.BytesIO()
    with ThreadPoolExecutor(3) as pool:
        made = ShardWriter(tokens, borders, Waits(TOKENIZER), bos=False, pool=pool, ahead=lambda: 3)
        for number in range(6):
            made.add(Document(number, [f"x{number}"]))
        made.finish()
    assert made.num_documents == 6


def test_a_failure_in_a_thread_is_raised(monkeypatch) -> None:
    class Fails(Encoder):
        def encode(self, texts):
            if texts[0] == "bad":
                raise MemoryError("no room")
            return super().encode(texts)

    with ThreadPoolExecutor(2) as pool:
        made = ShardWriter(io.BytesIO(), io.BytesIO(), Fails(TOKENIZER), bos=False, pool=pool, ahead=lambda: 2)
        made.add(Document(1, ["bad"]))
        with pytest.raises(MemoryError, match="no room"):
            made.finish()


def test_no_more_is_in_hand_than_asked(monkeypatch) -> None:
    """However long the file: one that adds waits for what is encoded."""
    monkeypatch.setattr(writer, "BATCH_CHARACTERS", 1)
    begun, go_on = threading.Semaphore(0), threading.Event()

    class Waits(Encoder):
        def encode(self, texts):
            if texts[0].startswith("x"):
                begun.release()
                assert go_on.wait(30)
            return super().encode(texts)

    with ThreadPoolExecutor(8) as pool:
        made = ShardWriter(io.BytesIO(), io.BytesIO(), Waits(TOKENIZER), bos=False, pool=pool, ahead=lambda: 2)
        added = []

        def add() -> None:
            for number in range(6):
                made.add(Document(number, [f"x{number}"]))
                added.append(number)

        adding = threading.Thread(target=add)
        adding.start()
        for _ in range(3):  # the third does not come back before the first is written
            assert begun.acquire(timeout=30)
        assert not begun.acquire(timeout=0.2)
        assert added == [0, 1]
        go_on.set()
        adding.join(30)
        made.finish()
    assert made.num_documents == 6
