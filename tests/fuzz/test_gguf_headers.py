"""GGUF files whose header says other things than their tensors, or nothing that can be read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncelm.models.gguf import read_gguf
from tests.fuzz.guard import damaged_text, draws, guarded

gguf = pytest.importorskip("gguf", reason="needs `pip install gguf`")
pytestmark = pytest.mark.slow
FOLDER = Path(mkdtemp(prefix="fuzz-"))
SIZES = ["context_length", "embedding_length", "block_count", "feed_forward_length", "head_count", "head_count_kv",
         "rope_dimension_count", "vocab_size", "bos_token_id", "eos_token_id"]  # fmt: skip
NUMBERS = [None, 0, 1, 2, 3, 4, 64, 65, 10**6, 2**31 - 1, 2**31, 2**32 - 1]


@cache
def sound() -> bytes:
    from tests.models.gguf.files import make_llama, write

    write(make_llama(), FOLDER / "sound.gguf")
    return (FOLDER / "sound.gguf").read_bytes()


@draws(100)
@given(sizes=st.dictionaries(st.sampled_from(SIZES), st.sampled_from(NUMBERS), min_size=1, max_size=3))
def test_sizes(sizes) -> None:
    from tests.models.gguf.files import make_llama, write

    write(make_llama(), FOLDER / "sizes.gguf", **sizes)
    with guarded():
        read_gguf(FOLDER / "sizes.gguf")


@draws(200)
@given(data=st.data())
def test_bytes_of_the_header(data) -> None:
    whole = bytearray(sound())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, 700) | st.integers(0, len(whole) - 9))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4]))
        whole[where : where + len(new)] = new
    (FOLDER / "bytes.gguf").write_bytes(whole[: data.draw(st.just(None) | st.integers(0, len(whole)))])
    with guarded():
        read_gguf(FOLDER / "bytes.gguf")


@draws(60)
@given(head=damaged_text("GGUF\3\0\0\0" + "\0" * 16 + "general.architecture"))
def test_what_only_begins_as_one(head) -> None:
    (FOLDER / "head.gguf").write_bytes(head)
    with guarded():
        read_gguf(FOLDER / "head.gguf")
