"""The head of a GGUF file: lengths beyond the file are refused at once, whatever they count."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oncelm.models.gguf import read_gguf
from oncelm.models.gguf.header import SCALARS, read_header
from tests.models.gguf.files import gguf, make_llama, write

HUGE = 2**60


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def head(*parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count) + items


def tensor(name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def test_every_kind_of_value(tmp_path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "f"), "llama")
    adders = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64", "bool")
    for number, kind in enumerate(adders):
        getattr(writer, f"add_{kind}")(kind, number % 2)
    writer.add_string("text", "naïve")
    writer.add_array("texts", ["a", "", "漢"])
    writer.add_array("numbers", [1.5, -2.0])
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(tmp_path / "f")
    assert [found.metadata[kind] for kind in adders] == [number % 2 for number in range(len(adders))]
    assert found.metadata["bool"] is False
    assert (found.metadata["text"], found.metadata["texts"]) == ("naïve", ["a", "", "漢"])
    assert found.metadata["numbers"].tolist() == [1.5, -2.0]
    assert found.tensors["t"].shape == (2, 3)
    packed = found.data[found.tensors["t"].start :][:24]
    assert np.frombuffer(packed, np.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (head(keys=HUGE), "is damaged, or cut off"),
        (head(tensors=HUGE), "is damaged, or cut off"),
        (head(keys=HUGE) + bytes(2**20), "the key  stands there twice"),
        *((head(array(kind, HUGE), bytes(64), keys=1), "bytes named at byte") for kind in SCALARS),
        (head(array(8, HUGE), bytes(64), keys=1), "bytes named at byte"),
        (head(array(9, HUGE), bytes(64), keys=1), "an array of kind 9"),
        (head(array(77, 1), bytes(64), keys=1), "an array of kind 77"),
        (head(text("a") + struct.pack("<I", 77), bytes(64), keys=1), "a value of kind 77"),
        (head(struct.pack("<Q", HUGE), keys=1), "bytes named at byte 32"),
        (
            head(text("a") + struct.pack("<Ib", 1, 1), text("a") + struct.pack("<Ib", 1, 1), keys=2),
            "key a stands",
        ),
        (head(text("general.alignment") + struct.pack("<II", 4, 0), keys=1), "general.alignment is 0"),
        (head(tensor(), tensor(), bytes(64), tensors=2), "tensor t stands there twice"),
        (head(tensor(dims=(1,) * 5), bytes(64), tensors=1), "has 5 dimensions"),
        (head(tensor(dims=()), bytes(64), tensors=1), r"has the shape \[\], in blocks of 1"),
        (head(tensor(dims=(0, 4)), bytes(64), tensors=1), r"has the shape \[0, 4\], in blocks of 1"),
        (head(tensor(dims=(33,), kind=8), bytes(64), tensors=1), r"has the shape \[33\], in blocks of 32"),
        (head(tensor(kind=4), bytes(64), tensors=1), "packed as kind 4, which"),
        (
            head(tensor(dims=(2**40, 2**40)), bytes(64), tensors=1),
            "ends at byte 4,835,703,278,458,516,698,824,8",
        ),
        (head(tensor(offset=HUGE), bytes(64), tensors=1), "tensor t ends at byte"),
        (head(version=1), "GGUF file of version 1; versions 2 and 3 can be read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ],
)
def test_lengths_are_compared_with_the_file(content, message, tmp_path) -> None:
    (tmp_path / "f.gguf").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "f.gguf")
    assert time.perf_counter() - start < 1


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_head_never_ends_in_a_traceback(tmp_path, data) -> None:
    """Bytes of the head are changed, cut out or put in: the file is read or refused in one line."""
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        write(make_llama(), whole)
    content = bytearray(whole.read_bytes())
    end = read_header(whole).tensors["token_embd.weight"].start
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, end - 1))
        new = data.draw(st.binary(max_size=8))
        content[at : at + data.draw(st.sampled_from([0, len(new), 4]))] = new
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    with contextlib.suppress(OneLine):
        read_in_one_line(damaged)


class OneLine(Exception):
    """A refusal as it should be."""


def read_in_one_line(file: Path) -> None:
    try:
        read_gguf(file)
    except ValueError as error:
        if "\n" in str(error):
            raise
        raise OneLine from error
