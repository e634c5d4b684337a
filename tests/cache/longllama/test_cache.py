"""Memories of every kind hold the same and give the same; copies, files, rows; a full disk."""

from __future__ import annotations

import copy
import errno
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.cache import load_snapshot, save_snapshot
from oncelm.cache.longllama import memory_kv
from oncelm.cache.longllama.cache import LongLlamaCache
from oncelm.cache.longllama.memory_kv import MemoryKV
from oncelm.ops.attention import partial
from oncelm.ops.attention.grouping import attention_groups
from tests.full_disk import no_space, small_files
from tests.models.small import make_long
from tests.models.test_longllama import ids, logits, same

REMOTE: dict[str, dict[str, Any]] = {
    "cpu": {"memory": "cpu", "block_tokens": 7},
    "disk": {"memory": "disk", "block_tokens": 7},
    "knn, all keys": {"memory": "knn", "top_k": 10_000},
}


def needs_faiss(kind: str) -> None:
    if kind.startswith("knn"):
        pytest.importorskip("faiss", reason="needs `pip install faiss-cpu`")


def read(model, tokens: torch.Tensor, splits: list[int], cache: LongLlamaCache, mask: Any = None) -> torch.Tensor:
    """Logits of tokens taken in piece by piece."""
    borders = sorted({0, *splits, tokens.shape[1]})
    parts = [
        logits(model, tokens[:, a:b], past_key_values=cache, attention_mask=None if mask is None else mask[:, :b])
        for a, b in pairwise(borders)
    ]
    return torch.cat(parts, dim=1)


# -- every kind of memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REMOTE)
@settings(deadline=None, max_examples=12)
@given(data=st.data(), T=st.integers(1, 80), grouping=st.sampled_from([None, (1, 5), (2, 3), (3, 100)]))
def test_equal_to_exact(kind, data, T, grouping) -> None:
    needs_faiss(kind)
    model, tokens = make_long(mem_attention_grouping=grouping), ids(2, T)
    mask = torch.ones_like(tokens)
    mask[1, : data.draw(st.integers(0, T - 1))] = 0
    splits = data.draw(st.lists(st.integers(1, T), max_size=3))
    expected = read(model, tokens, splits, model.new_cache(2), mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial, "SCORE_ELEMENTS", {"cpu": data.draw(st.sampled_from([1, 300, 1 << 24]))})
        found = read(model, tokens, splits, model.new_cache(2, **REMOTE[kind]), mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **same)


def test_a_growing_cache_is_a_preallocated_one(poisoned_memory) -> None:
    model, tokens = make_long(), ids(2, 300)
    expected = read(model, tokens, [100, 101], model.new_cache(2, 300))
    assert torch.equal(read(model, tokens, [100, 101], model.new_cache(2)), expected)


def test_decoding_through_the_decode_op(monkeypatch) -> None:
    """On a GPU a kernel decodes all rows at once, memories of any length; here its PyTorch form does."""
    model, tokens, mask = make_long(), ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :33] = 0
    splits = [40, 41, 42, 45, 50]
    expected = read(model, tokens, splits, model.new_cache(2), mask)
    calls = []
    original = memory_kv.decode_attention
    monkeypatch.setattr(memory_kv, "has_decode_kernel", lambda q, k: True)
    monkeypatch.setattr(memory_kv, "decode_attention", lambda *a, **o: calls.append(1) or original(*a, **o))
    found = read(model, tokens, splits, model.new_cache(2), mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **same)
    assert len(calls) >= 6


def test_memory_dtypes() -> None:
    """A narrower memory is close to a full one, and smaller; local attention stays as it is."""
    tokens = ids(1, 120)
    expected = logits(make_long(), tokens)
    errors = {}
    for dtype in ("float32", "bfloat16", "int8"):
        model = make_long(mem_dtype=dtype)
        found = logits(model, tokens)
        errors[dtype] = (found - expected).abs().max().item()
        torch.testing.assert_close(found[:, :16], expected[:, :16], **same)
    assert errors["float32"] < 2e-5
    assert 1e-4 < errors["bfloat16"] < 0.3
    assert 1e-4 < errors["int8"] < 0.6

    def stored(dtype: str) -> int:
        cache = make_long(mem_dtype=dtype).new_cache(1, memory="cpu")
        logits(make_long(mem_dtype=dtype), tokens, past_key_values=cache)
        return cache.layers[1].store.nbytes()

    assert stored("bfloat16") * 2 == stored("float32")
    assert stored("int8") * 8 == stored("float32") * 3  # heads of 8: 1 byte a number, 4 for a scale


def test_a_model_of_another_dtype_than_its_memory() -> None:
    model = make_long(mem_dtype="float32").to(torch.bfloat16)
    found = logits(model, ids(1, 60))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), logits(make_long(), ids(1, 60)), rtol=0.1, atol=0.5)


def test_peak_memory_is_the_memory_layers_keys_and_one_window() -> None:
    model = make_long()
    cache = model.new_cache(1, 1000)
    read(model, ids(1, 990), [], cache)
    memory, local = cache.layers[1], cache.layers[0]
    assert isinstance(memory, MemoryKV)
    assert memory.k.shape[1] == 1000  # not a token more
    assert local.k.shape[1] == 16
    assert memory.raw_keys.capacity <= 16


@given(
    T=st.integers(1, 9),
    heads=st.sampled_from([(4, 1), (4, 2), (6, 3), (3, 3)]),
    grouping=st.none() | st.tuples(st.integers(1, 7), st.integers(1, 10)),
)
def test_attention_groups_cover_everything_once(T, heads, grouping) -> None:
    H, H_kv = heads
    q = torch.zeros(1, T, H, 2)
    covered = torch.zeros(T, H)
    for at, some, kv in attention_groups(q, H_kv, grouping):
        covered[at, some] += 1
        queries, keys = len(range(*some.indices(H))), len(range(*kv.indices(H_kv)))
        assert queries % keys == 0
        assert [h // (H // H_kv) for h in range(*some.indices(H))] == [
            list(range(*kv.indices(H_kv)))[i // (queries // keys)] for i in range(queries)
        ]
        if grouping:
            assert queries <= grouping[0]
            assert at.stop - at.start <= grouping[1]
    assert (covered == 1).all()


# -- nearest keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_recall_of_indexes(index) -> None:
    needs_faiss("knn")
    from oncelm.cache.longllama.knn import MemoryIndex

    generator = torch.Generator().manual_seed(0)
    store = MemoryIndex(1, 2, 16, torch.float32, top_k=8, index=index, measure_recall=True)
    keys, values = (torch.randn(1, 5000, 2, 16, generator=generator) for _ in "kv")
    for first in range(0, 5000, 1000):
        store.append(slice(0, 1), keys[:, first : first + 1000], values[:, first : first + 1000], first)
    q = torch.randn(1, 20, 4, 16, generator=generator)
    o, lse = store.attend(q, slice(0, 1), 5000)
    recall = store.found / store.wanted
    assert recall == 1 if index == "flat" else 0.3 < recall < 1
    everything = partial.partial_attention(q, keys, values)
    assert (lse <= everything[1] + 1e-5).all()
    if index == "flat":  # the definition, for one query head
        scores = q[0, 3, 1] @ keys[0, :, 0].T / 4
        top = scores.topk(8)
        expected = top.values.softmax(-1) @ values[0, top.indices, 0]
        torch.testing.assert_close(o[0, 3, 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_what_all_keys_share_leads_no_index_astray(index) -> None:
    """As a head's keys do: their mean is twice as long as what tells them apart."""
    needs_faiss("knn")
    from oncelm.cache.longllama.knn import MemoryIndex

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    store = MemoryIndex(1, 1, 32, torch.float32, top_k=32, index=index, measure_recall=True)
    subjects = 2 * draw(64, 32)  # neighbouring keys are about the same
    keys = (subjects.repeat_interleave(80, 0) + draw(5120, 32) + 2 * draw(32) * 32**0.5 / 4)[None, :, None]
    for first in range(0, 5120, 1024):
        store.append(slice(0, 1), keys[:, first : first + 1024], keys[:, first : first + 1024], first)
    store.attend(draw(1, 50, 2, 32) + subjects[:50, None].expand(50, 2, 32)[None], slice(0, 1), 5120)
    assert store.found / store.wanted > 0.95


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_any_of_equal_keys_is_a_find(index) -> None:
    """Keys of the first layer are the same wherever a token comes again."""
    needs_faiss("knn")
    from oncelm.cache.longllama.knn import MemoryIndex

    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(25, 16, generator=generator)
    keys = kinds.repeat(200, 1)[None, :, None]
    store = MemoryIndex(1, 1, 16, torch.float32, top_k=8, index=index, measure_recall=True)
    store.append(slice(0, 1), keys, keys, 0)
    store.attend(kinds[None, :, None], slice(0, 1), 5000)
    assert store.wanted == 25 * 8
    recall = store.found / store.wanted
    assert recall > 0.7 if index == "hnsw" else recall == 1  # equal keys are each other's only neighbours in its graph


def test_few_keys_are_not_all() -> None:
    needs_faiss("knn")
    model, tokens = make_long(), ids(1, 120)
    exact = logits(model, tokens)
    errors = [
        (read(model, tokens, [], model.new_cache(1, memory="knn", top_k=k)) - exact).abs().mean().item()
        for k in (1, 8, 64)
    ]
    assert errors[0] > errors[1] > errors[2] > 1e-6
    cache = model.new_cache(1, memory="knn", top_k=8, index="hnsw", measure_recall=True)
    read(model, tokens, [], cache)
    assert list(cache.recall()) == [1, 2]
    assert all(0.5 < share <= 1 for share in cache.recall().values())
    assert model.new_cache(1).recall() == {}


def test_without_faiss(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("no module named faiss")

    monkeypatch.setattr("oncelm.cache.longllama.knn.importlib.import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'oncelm\[knn\]'"):
        make_long().new_cache(1, memory="knn")


# -- copies, files, rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["exact", *REMOTE])
@pytest.mark.parametrize("source", ["exact", *REMOTE])
def test_a_file_goes_into_a_cache_of_any_kind(source, into, tmp_path) -> None:
    needs_faiss(source)
    needs_faiss(into)
    model, tokens, more = make_long(), ids(2, 50), ids(2, 20, seed=1)
    mask = torch.ones_like(tokens)
    mask[1, :21] = 0
    cache = model.new_cache(2, **REMOTE.get(source, {}))
    read(model, tokens, [], cache, mask)
    save_snapshot(cache.snapshot(), tmp_path / "cache", model.fingerprint())
    expected = read(model, more, [3], cache)
    new = model.new_cache(2, **REMOTE.get(into, {}))
    new.restore(load_snapshot(tmp_path / "cache", model.fingerprint()))
    torch.testing.assert_close(read(model, more, [3], new), expected, **same)
    assert new.lengths == cache.lengths


def test_int8_survives_a_file(tmp_path) -> None:
    model, tokens = make_long(mem_dtype="int8"), ids(1, 50)
    cache = model.new_cache(1)
    read(model, tokens, [], cache)
    new = model.new_cache(1)
    new.restore(cache.snapshot())
    torch.testing.assert_close(read(model, tokens, [], new), read(model, tokens, [], cache), rtol=0, atol=1e-3)


def test_a_snapshot_of_another_model_or_batch_or_place() -> None:
    model = make_long()
    cache = model.new_cache(2)
    read(model, ids(2, 30), [], cache)
    snapshot = cache.snapshot()
    with pytest.raises(ValueError, match="of 2 sequences, the cache has 1"):
        model.new_cache(1).restore(snapshot)
    with pytest.raises(ValueError, match="holds 30 tokens, the cache at most 20"):
        model.new_cache(2, 20).restore(snapshot)
    with pytest.raises(ValueError, match="other layers than this one"):
        make_long(mem_layers=[1]).new_cache(2).restore(snapshot)
    with pytest.raises(ValueError, match="restored into a new cache"):
        cache.restore(snapshot)


def test_a_file_of_another_model(tmp_path) -> None:
    model, other = make_long(), make_long(mem_layers=[0, 2])
    cache = model.new_cache(1)
    read(model, ids(1, 30), [], cache)
    save_snapshot(cache.snapshot(), tmp_path / "cache", model.fingerprint())
    with pytest.raises(ValueError, match="was computed by another model"):
        load_snapshot(tmp_path / "cache", other.fingerprint())
    assert make_long(mem_dtype="int8", last_context_length=3).fingerprint() == model.fingerprint()
    data = bytearray((tmp_path / "cache").read_bytes())
    data[-5] ^= 1
    (tmp_path / "cache").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        load_snapshot(tmp_path / "cache", model.fingerprint())


@pytest.mark.parametrize("kind", ["exact", *REMOTE])
def test_rows(kind) -> None:
    needs_faiss(kind)
    model, tokens, more = make_long(), ids(3, 45), ids(3, 20, seed=1)
    cache = model.new_cache(3, **REMOTE.get(kind, {}))
    read(model, tokens, [], cache)
    chosen = [2, 0, 0, 1]
    expected = read(model, more, [], model_copy(model, tokens))[chosen]
    cache.select(chosen)
    torch.testing.assert_close(read(model, more[chosen], [], cache), expected, **same)
    cache.select([3])
    assert cache.batch_size == 1
    with pytest.raises(ValueError, match=r"rows must be in 0\.\.0"):
        cache.select([1])


def model_copy(model, tokens: torch.Tensor) -> LongLlamaCache:
    cache = model.new_cache(len(tokens))
    read(model, tokens, [], cache)
    return cache


@pytest.mark.parametrize("kind", ["exact", *REMOTE])
def test_a_deep_copy_is_a_cache_of_its_own(kind) -> None:
    needs_faiss(kind)
    model, more = make_long(), ids(2, 20, seed=1)
    cache = model.new_cache(2, **REMOTE.get(kind, {}))
    read(model, ids(2, 45), [], cache)
    copied = copy.deepcopy(cache)
    read(model, more, [], cache)
    torch.testing.assert_close(
        read(model, more, [], copied), read(model, more, [], model_copy(model, ids(2, 45))), **same
    )


def test_crop() -> None:
    model, tokens, more = make_long(), ids(2, 45), ids(2, 3, seed=1)
    cache = model_copy(model, tokens)
    expected = read(model, more, [], model_copy(model, tokens))
    read(model, ids(2, 4, seed=3), [], cache)
    cache.crop(-4)
    torch.testing.assert_close(read(model, more, [], cache), expected, **same)
    with pytest.raises(ValueError, match="only 9 are in the local cache"):
        cache.crop(10)
    assert cache.local == (9, 9)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_too_long_for_the_cache() -> None:
    model = make_long()
    cache = model.new_cache(1, 20)
    read(model, ids(1, 15), [], cache)
    with pytest.raises(ValueError, match="holds at most 20 tokens a sequence and has 15; 6 more do not fit"):
        read(model, ids(1, 6), [], cache)
    read(model, ids(1, 5), [], cache)


def test_a_pass_that_fails_midway_leaves_the_cache_refused(monkeypatch) -> None:
    model = make_long()
    cache = model_copy(model, ids(2, 30))
    monkeypatch.setattr(model.model.layers[2], "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        read(model, ids(2, 30), [], cache)
    monkeypatch.undo()
    for use in (lambda: read(model, ids(2, 3), [], cache), lambda: cache.crop(1), cache.snapshot):
        with pytest.raises(ValueError, match="failed midway"):
            use()


def fail(*args: Any, **options: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_full_disk_behind_disk_memory(monkeypatch, tmp_path) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = make_long()
    cache = model.new_cache(1, memory="disk", folder=tmp_path, block_tokens=20)
    read(model, ids(1, 24), [], cache)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for a block of memory .* No space left"):
        read(model, ids(1, 40), [], cache)
    with pytest.raises(ValueError, match="failed midway"):
        read(model, ids(1, 3), [], cache)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_rows_are_chosen(monkeypatch, tmp_path) -> None:
    model = make_long()
    cache = model.new_cache(2, memory="disk", folder=tmp_path, block_tokens=20)
    read(model, ids(2, 45), [], cache)
    allocate, calls = os.posix_fallocate, []

    def full_at_last(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 3:  # some of the first layer's rows have been chosen
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(*args)

    monkeypatch.setattr(os, "posix_fallocate", full_at_last)
    with pytest.raises(OSError, match="no room for a block of memory"):
        cache.select([1, 0, 1])
    for use in (lambda: read(model, ids(2, 3), [], cache), cache.snapshot, lambda: cache.select([0])):
        with pytest.raises(ValueError, match="failed midway"):
            use()


def test_disk_memory_needs_a_folder_to_write_to(monkeypatch, tmp_path) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    model = make_long()
    cache = model.new_cache(1, memory="disk", folder=tmp_path)
    monkeypatch.setattr("oncelm.cache.longllama.blocks.tempfile.mkstemp", refuse)
    with pytest.raises(OSError, match=rf"cannot make a file in {tmp_path}: Permission denied"):
        read(model, ids(1, 40), [], cache)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 4}])
def test_a_snapshot_of_other_heads_is_refused(changes) -> None:
    model, other = make_long(), make_long(**changes)
    cache = model.new_cache(1)
    with pytest.raises(ValueError, match=r"layers\.0\..* of the snapshot has heads of"):
        cache.restore(model_copy(other, ids(1, 45)).snapshot())
    cache.restore(model_copy(model, ids(1, 45)).snapshot())  # nothing had changed


def test_disk_memory_leaves_no_files(tmp_path) -> None:
    cache = make_long().new_cache(1, memory="disk", folder=tmp_path)
    read(make_long(), ids(1, 60), [], cache)
    assert list(tmp_path.iterdir()) == []
    assert cache.layers[1].store.nbytes() > 0


@pytest.mark.parametrize("failure", [no_space, small_files])
def test_a_full_disk_when_a_memory_is_saved(failure, monkeypatch, tmp_path: Path) -> None:
    model = make_long()
    cache = model_copy(model, ids(2, 400))
    save_snapshot(model_copy(model, ids(2, 20)).snapshot(), tmp_path / "cache", model.fingerprint())
    before = (tmp_path / "cache").read_bytes()
    if failure is no_space:
        monkeypatch.setattr(
            "oncelm.cache.disk.save_file", lambda *a, **o: (_ for _ in ()).throw(OSError("No space left"))
        )
    with failure(), pytest.raises(OSError, match="cannot write"):
        save_snapshot(cache.snapshot(), tmp_path / "cache", model.fingerprint())
    assert (tmp_path / "cache").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "gpu"}, "unknown memory 'gpu'"),
        ({"memory": "knn", "index": "hsnw"}, "did you mean 'hnsw'"),
        ({"memory": "knn", "top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"memory": "cpu", "block_tokens": 0}, "block_tokens must be a whole number of at least 1"),
        ({"memory": "disk", "folder": "/no/such/folder"}, "'/no/such/folder' for the files of memory 'disk'"),
        ({"dtype": "bfloat16"}, "did you mean 'torch.bfloat16'"),
        ({"batch_size": "2"}, "batch_size must be a whole number of at least 1, got '2'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_long().new_cache(**options)


def test_int8_is_not_searched() -> None:
    with pytest.raises(ValueError, match="mem_dtype 'int8' is not for memory 'knn'"):
        make_long(mem_dtype="int8").new_cache(memory="knn")
