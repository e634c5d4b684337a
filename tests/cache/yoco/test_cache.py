"""The model cache: sizes, snapshots, rewind points, rows, undoing, files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oncelm.cache.disk as disk
from oncelm.cache import load_snapshot, save_snapshot
from tests.models.small import VOCAB, make_model

MODELS = {kind: make_model(kind) for kind in ("retention", "window", "interleaved", "retention-only", "hybrid")}
kinds = pytest.mark.parametrize("kind", MODELS)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_bytes_are_one_layer_of_keys_and_values_and_fixed_states() -> None:
    model, S = MODELS["retention"], 1000
    config = model.config
    shared = 2 * S * config.num_key_value_heads * config.head_dim * 4
    states = 2 * config.num_self_heads * config.self_head_dim**2 * 4
    assert model.new_cache(1, S).nbytes() == shared + states
    assert model.new_cache(3, S).nbytes() == 3 * (shared + states)
    assert model.new_cache(1, S, dtype=torch.bfloat16).nbytes() == shared // 2 + states


@kinds
def test_memory_is_allocated_once(kind: str) -> None:
    model = MODELS[kind]
    cache = model.new_cache(2, 50)
    addresses = {name: tensor.data_ptr() for name, tensor in cache.tensors().items()}
    model.prefill(ids(2, 30), cache, chunk_size=7)
    for t in range(20):
        model(ids(2, 1, seed=t), past_key_values=cache)
    assert {name: tensor.data_ptr() for name, tensor in cache.tensors().items()} == addresses
    assert cache.num_tokens == 50


@kinds
def test_a_cache_narrower_than_the_model(kind: str) -> None:
    """bf16 keys and values under a float32 model: logits of its dtype, near the full ones, padded rows too."""
    model, tokens = MODELS[kind], ids(2, 30)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        cache = model.new_cache(2, 40, dtype=dtype)
        model.prefill(tokens[:, :20], cache, chunk_size=9, attention_mask=mask[:, :20])
        pieces = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(20, 25)]
        pieces.append(model(tokens[:, 25:], past_key_values=cache).logits)
        results.append(torch.cat(pieces, dim=1))
    narrow, exact = results
    assert narrow.dtype == torch.float32
    assert (narrow - exact).norm() < 0.1 * exact.norm()


def test_a_growing_cache_doubles() -> None:
    model = MODELS["retention"]
    cache = model.new_cache(1)
    capacities = set()
    for t in range(300):
        model(ids(1, 3, seed=t), past_key_values=cache)
        capacities.add(cache.shared.capacity)
    assert capacities == {256, 512, 1024}


@kinds
@settings(max_examples=10, deadline=None)
@given(first=st.integers(1, 20), second=st.integers(1, 20), shared=st.booleans())
def test_snapshot_and_restore(kind: str, first: int, second: int, shared: bool) -> None:
    model = MODELS[kind]
    cache = model.new_cache(2, 80)
    model.prefill(ids(2, first), cache)
    point = cache.snapshot(shared=shared)
    expected = model(ids(2, second, seed=1), past_key_values=cache).logits
    for _ in range(2):
        model(ids(2, 5, seed=2), past_key_values=cache)
        cache.restore(point)
        assert cache.num_tokens == first
        torch.testing.assert_close(model(ids(2, second, seed=1), past_key_values=cache).logits, expected)


def test_a_snapshot_says_how_keys_are_kept_without_a_cross_decoder_too() -> None:
    cache = make_model("full", num_cross_decoder_layers=0).new_cache(1, 4, torch.int8)
    assert cache.snapshot().kv_dtype == torch.int8
    assert make_model("retention-only").new_cache(1, 4).snapshot().kv_dtype is None


@kinds
def test_a_snapshot_fits_another_cache(kind: str) -> None:
    model = MODELS[kind]
    cache = model.new_cache(1, 30)
    model.prefill(ids(1, 20), cache)
    other = model.new_cache(1, None)
    other.restore(cache.snapshot())
    expected = model(ids(1, 4, seed=1), past_key_values=cache).logits
    torch.testing.assert_close(model(ids(1, 4, seed=1), past_key_values=other).logits, expected)


def test_rewind_points_end_when_their_keys_are_overwritten() -> None:
    model = MODELS["retention"]
    cache = model.new_cache(1, 60)
    model.prefill(ids(1, 10), cache)
    early = cache.snapshot(shared=False)
    model.prefill(ids(1, 10), cache)
    late = cache.snapshot(shared=False)
    cache.restore(early)
    with pytest.raises(ValueError, match="rewind point"):
        cache.restore(late)
    with pytest.raises(ValueError, match="rewind point"):
        model.new_cache(1, 60).restore(early)
    cache.restore(early)


def test_removing_nothing_forgets_nothing() -> None:
    model = MODELS["retention"]
    cache = model.new_cache(1, 30)
    cache.record()
    model(ids(1, 10), past_key_values=cache)
    cache.crop(0)
    cache.crop(3)
    assert cache.lengths == (7,)


def test_a_rewind_point_is_of_one_cache_and_one_text() -> None:
    model = MODELS["retention"]
    cache, other = model.new_cache(1, 60), model.new_cache(1, 60)
    model.prefill(ids(1, 10), cache)
    point = cache.snapshot(shared=False)
    model.prefill(ids(1, 10, seed=1), other)
    other.snapshot(shared=False)
    with pytest.raises(ValueError, match="of another cache"):
        other.restore(point)
    model.prefill(ids(1, 10, seed=1), other)
    cache.restore(other.snapshot())  # longer, and its keys take the place of the point's
    with pytest.raises(ValueError, match="was overwritten"):
        cache.restore(point)


def test_nothing_of_an_earlier_text_is_left_after_reset() -> None:
    model = MODELS["retention"]
    cache = model.new_cache(2, 30)
    model.prefill(ids(2, 20), cache)
    cache.shared.k[:, :20], cache.shared.v[:, :20] = float("nan"), float("nan")
    cache.reset()
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 2:] = 0
    model.prefill(ids(2, 10), cache, attention_mask=mask)
    assert model(ids(2, 1), past_key_values=cache).logits.isfinite().all()


def test_room_is_counted_by_sequence() -> None:
    model = MODELS["retention"]
    cache, mask = model.new_cache(2, 20), torch.ones(2, 16, dtype=torch.long)
    mask[1, 4:] = 0
    model.prefill(ids(2, 16), cache, attention_mask=mask)
    with pytest.raises(ValueError, match="has 16; 10 more do not fit"):
        model.prefill(ids(2, 10), cache)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 4:] = 0
    model.prefill(ids(2, 10), cache, attention_mask=mask)
    assert cache.lengths == (20, 14)


def test_restore_checks_sizes() -> None:
    model = MODELS["retention"]
    cache = model.new_cache(1, 30)
    model.prefill(ids(1, 20), cache)
    snapshot = cache.snapshot()
    with pytest.raises(ValueError, match="holds 20 tokens, the cache at most 10"):
        model.new_cache(1, 10).restore(snapshot)
    with pytest.raises(ValueError, match="is of 1 sequences, the cache has 2"):
        model.new_cache(2, 30).restore(snapshot)
    with pytest.raises(ValueError, match="other layers"):
        MODELS["window"].new_cache(1, 30).restore(snapshot)


@kinds
@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_select_rows(kind: str, rows: list[int]) -> None:
    """Beam search's reordering, with repeats, more rows and fewer."""
    model, tokens = MODELS[kind], ids(3, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    cache = model.new_cache(3, 20)
    model(tokens, attention_mask=mask, past_key_values=cache)
    cache.select(rows)
    chosen = model.new_cache(len(rows), 20)
    model(tokens[rows], attention_mask=mask[rows], past_key_values=chosen)
    step = ids(len(rows), 1, seed=1)
    torch.testing.assert_close(
        model(step, past_key_values=cache).logits, model(step, past_key_values=chosen).logits, rtol=1e-4, atol=1e-4
    )


def test_select_refuses_rows_that_are_not_there() -> None:
    cache = MODELS["retention"].new_cache(2, 4)
    with pytest.raises(ValueError, match=r"rows must be in 0\.\.1"):
        cache.select([2])
    for rows in ([], torch.tensor([True, False]), [0.0], torch.tensor([[0]])):
        with pytest.raises(ValueError, match="at least one row number"):
            cache.select(rows)


@kinds
@settings(max_examples=15, deadline=None)
@given(data=st.data(), before=st.integers(1, 20), added=st.integers(1, 12), padded=st.booleans())
def test_crop_undoes_exactly(kind: str, data: st.DataObject, before: int, added: int, padded: bool) -> None:
    model = MODELS[kind]
    removed = data.draw(st.integers(0, added))
    head, tail, then = ids(2, before), ids(2, added, seed=1), ids(2, 3, seed=2)
    mask = torch.ones_like(head)
    if padded and before > 1:
        mask[0, 0] = 0
    caches = [model.new_cache(2, 60) for _ in range(2)]
    for cache in caches:
        model(head, attention_mask=mask, past_key_values=cache)
    caches[0].record()
    model(tail, past_key_values=caches[0])
    caches[0].crop(-removed)
    if added > removed:
        model(tail[:, : added - removed], past_key_values=caches[1])
    assert caches[0].lengths == caches[1].lengths
    results = [model(then, past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@kinds
def test_crop_undoes_several_forward_passes(kind: str) -> None:
    model = MODELS[kind]
    caches = [model.new_cache(2, 60) for _ in range(2)]
    for cache in caches:
        model(ids(2, 9), past_key_values=cache)
    caches[0].record()
    for length in (3, 1, 2):
        model(ids(2, length, seed=length), past_key_values=caches[0])
    caches[0].crop(torch.tensor(-4))
    model(ids(2, 3, seed=3)[:, :2], past_key_values=caches[1])
    results = [model(ids(2, 3, seed=9), past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_crop_refuses_what_it_cannot_undo() -> None:
    model = MODELS["retention"]
    cache = model.new_cache(1, 60)
    model(ids(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"turn cache\.record\(\) on before"):
        cache.crop(-1)
    cache.record()
    model(ids(1, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="asked to remove 3 tokens and can undo 2"):
        cache.crop(-3)
    cache.crop(-2)
    assert cache.num_tokens == 5


@kinds
def test_reset_forgets_everything(kind: str) -> None:
    model = MODELS[kind]
    cache = model.new_cache(1, 40)
    model.prefill(ids(1, 33), cache)
    cache.reset()
    expected = model(ids(1, 9, seed=3), use_cache=False).logits
    got = model(ids(1, 9, seed=3), past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@kinds
def test_disk_round_trip(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]
    cache = model.new_cache(1, 40)
    model.prefill(ids(1, 30), cache)
    save_snapshot(cache.snapshot(), tmp_path / "book.cache", model.fingerprint())
    loaded = model.new_cache(1, 40)
    loaded.restore(load_snapshot(tmp_path / "book.cache", model.fingerprint()))
    step = ids(1, 2, seed=1)
    torch.testing.assert_close(
        model(step, past_key_values=loaded).logits, model(step, past_key_values=cache).logits, rtol=0, atol=0
    )


def test_files_that_are_refused(tmp_path: Path) -> None:
    model = MODELS["retention"]
    cache = model.new_cache(1, 40)
    model.prefill(ids(1, 30), cache)
    file, mark = tmp_path / "book.cache", model.fingerprint()
    save_snapshot(cache.snapshot(), file, mark)
    with pytest.raises(FileNotFoundError, match="no cache file"):
        load_snapshot(tmp_path / "other", mark)
    with pytest.raises(ValueError, match="computed by another model"):
        load_snapshot(file, MODELS["window"].fingerprint())
    with pytest.raises(ValueError, match="no shared K/V to save"):
        save_snapshot(cache.snapshot(shared=False), file, mark)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged"):
        load_snapshot(file, mark)
    for old, new in ((b'"columns":"30"', b'"columns":"20"'), (b'"lengths":"[30]"', b'"lengths":"oops"')):
        assert old in whole
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="is damaged"):
            load_snapshot(file, mark)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable cache file"):
        load_snapshot(file, mark)


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["retention"]
    cache = model.new_cache(1, 40)
    model.prefill(ids(1, 30), cache)
    file = tmp_path / "book.cache"
    save_snapshot(cache.snapshot(), file, "mark")
    before = file.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_snapshot(cache.snapshot(), file, "mark")
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_fingerprint_tells_models_apart() -> None:
    model = make_model("retention")
    mark = model.fingerprint()
    assert make_model("retention").fingerprint() == mark
    with torch.no_grad():
        model.embed_tokens.weight[0, 0] += 1
    assert model.fingerprint() != mark


def test_names_of_before_are_answered_by_those_of_now() -> None:
    with pytest.raises(ImportError, match=r"oncelm\.cache\.ModelCache is oncelm\.cache\.YocoCache now"):
        from oncelm.cache import ModelCache  # noqa: F401
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'memory': it is now called 'past'"):
        make_model("retention")(torch.ones(1, 3, dtype=torch.long), memory=None)
