"""Snapshots in CPU memory and on disk: the same bits, found again, and nothing else ever."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.engine.prefix import below, delta
from tests.engine.prefix.stand_in import DTYPES, Device, FakePool, same, text

MUCH = 1 << 20
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def empty(device: Device) -> None:
    """Everything leaves the device."""
    assert device.cache.free(device.pages.num_pages - 1, device.slots.num_slots - 1)
    device.check()


@dtypes
def test_bits_are_the_same_through_cpu_memory_disk_and_a_restart(dtype, tmp_path: Path) -> None:
    places = [3, 4, 8, 9, 17, 30]
    device = Device(dtype=dtype, cpu_bytes=MUCH, directory=tmp_path)
    request, made = device.request(text(30)), {}
    for n in places:
        request.read(n)
        assert request.add().n == n
        made[n] = request.content()
    request.end()

    def check(device: Device) -> None:
        for n in places:
            found, content = device.recall([*text(n), 5000])
            assert found == n
            assert same(content, made[n])
        device.check()

    check(device)
    empty(device)
    assert device.cache.nbytes()["cpu"] > 0
    check(device)
    device.cache.close()
    restarted = Device(dtype=dtype, cpu_bytes=0, directory=tmp_path)
    assert len(restarted.cache.tree) == len(places)
    check(restarted)
    for n in reversed(places):  # and each alone, whatever was restored before
        again = Device(dtype=dtype, page_size=8, directory=tmp_path)
        assert same(again.recall([*text(n), 5000])[1], made[n])


def test_only_what_is_new_is_kept_below() -> None:
    device = Device(num_slots=40, num_pages=200, cpu_bytes=MUCH)
    request = device.request(text(400))
    for n in range(40, 401, 40):
        request.read(n)
        request.add()
    request.end()
    empty(device)
    row = sum(rows[0, 0].nbytes for rows in device.pool.rows.values())
    state = sum(states[0].nbytes for states in device.pool.states.values())
    assert device.cache.nbytes()["cpu"] == 400 * row + 10 * state


def test_a_question_behind_a_document_that_stays_on_the_device_costs_the_document_once() -> None:
    device = Device(num_slots=6, num_pages=300, cpu_bytes=MUCH)
    device.remember(text(200))
    for seed in range(8):
        device.recall([*text(200), 1])  # used, so it stays
        device.remember([*text(200), *text(5, seed + 1)])
    row = sum(rows[0, 0].nbytes for rows in device.pool.rows.values())
    assert device.cache.match(text(201)).held_pages == 50
    assert 200 * row < device.cache.nbytes()["cpu"] < 300 * row


def test_another_computation_of_the_same_text_is_never_mixed_in() -> None:
    """Two requests read the same text at once, in other pieces, so with other rounding."""
    device = Device(cpu_bytes=MUCH)
    one, other = device.request(text(20), flavour=1), device.request(text(30), flavour=2)
    for request, places in ((one, (10, 20)), (other, (10, 20, 30))):
        for n in places:
            request.read(n)
            request.add()
    made = {20: None, 30: other.content()}
    made[20] = one.content()
    one.end()
    other.end()
    empty(device)
    for n, content in made.items():
        assert same(device.recall([*text(n), 5000])[1], content)


def test_leaves_go_from_cpu_memory_and_those_used_last_stay() -> None:
    device = Device(num_slots=20, num_pages=200)
    row = sum(rows[0, 0].nbytes for rows in device.pool.rows.values())
    state = sum(states[0].nbytes for states in device.pool.states.values())
    device = Device(num_slots=20, num_pages=200, cpu_bytes=60 * row + 4 * state)
    device.remember(text(30))
    for seed in (1, 2, 3):
        device.remember([*text(30), *text(10, seed)])
    empty(device)
    device.recall([*text(30), *text(10, 1), 0])
    empty(device)
    device.remember(text(10, 9))
    empty(device)
    found = [device.cache.match([*text(30), *text(10, seed), 0]).n for seed in (1, 2, 3)]
    assert found == [40, 30, 40]
    assert device.cache.match(text(13, 9)).n == 10
    assert device.cache.nbytes()["cpu"] <= 60 * row + 4 * state
    assert device.cache.counts.evicted_cpu == 1


def test_what_fits_nowhere_is_gone() -> None:
    device = Device(cpu_bytes=10)
    device.remember(text(30))
    empty(device)
    assert not len(device.cache.tree)
    assert device.cache.nbytes()["cpu"] == 0


def test_a_copy_is_waited_for_before_it_is_read_and_not_before(tmp_path, monkeypatch) -> None:
    """A stand-in for a GPU, whose copies to the host arrive when their event is waited for: until then the host reads
    nothing of use. Pages may be written meanwhile: what was gathered from them went before, in the same stream."""
    waited = []

    class Event:
        def __init__(self, late: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            self.late = late

        def synchronize(self) -> None:
            waited.append(len(self.late))
            for target, source in self.late:
                delta.as_bytes(target).copy_(delta.as_bytes(source))
            self.late.clear()

    real = delta.copy_off

    def late_copy(pool: FakePool, slot: int, pages: Any, start: int, stop: int) -> delta.Delta:
        copy, late = real(pool, slot, pages, start, stop), []
        for tensors in (copy.rows, copy.states):
            for name, tensor in tensors.items():
                late.append((torch.zeros_like(tensor), tensor))
                tensors[name] = late[-1][0]
        copy.ready = Event(late)
        return copy

    monkeypatch.setattr(below, "copy_off", late_copy)
    for options in ({"cpu_bytes": MUCH}, {"directory": tmp_path}):
        device = Device(num_pages=20, **options)
        made = device.remember(text(30))
        if "cpu_bytes" in options:
            assert not waited
            empty(device)
            assert not waited  # the step goes on
        else:
            empty(device)
            device.cache.flush()
            device = Device(num_pages=20, **options)
        device.remember(text(25, 1))  # on the same pages
        assert same(device.recall([*text(30), 1])[1], made)
        assert waited


def test_what_finds_the_queue_full_is_written_later(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("oncelm.engine.prefix.below.WAITING_BYTES", 1000)
    device, held = Device(num_pages=200, directory=tmp_path), threading.Event()
    device.cache._below._writer.submit(held.wait, 1000)
    request = device.request(text(60))
    for n in (20, 40, 60):
        request.read(n)
        request.add()
    request.end()
    device.remember(text(20, 1))
    assert device.cache._below._writer.is_behind
    assert device.cache.snapshots() == {"device": 4, "cpu": 0, "disk": 0}
    held.set()
    device.cache.flush()
    assert not list(tmp_path.glob("*.safetensors"))
    device.cache.match(text(9))
    device.cache.flush()
    assert list(tmp_path.glob("*.safetensors"))
    device.cache.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert Device(num_pages=200, directory=tmp_path).recall(text(61))[0] == 60


def test_files_of_other_models_are_left_alone(tmp_path: Path) -> None:
    for fingerprint in ("one", "other"):
        device = Device(fingerprint=fingerprint, directory=tmp_path)
        device.remember(text(20))
        device.cache.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    (tmp_path / "model.safetensors").write_bytes(b"somebody's weights")
    device = Device(fingerprint="one", directory=tmp_path, disk_bytes=700)
    for seed in range(5):
        device.remember(text(20, seed))
    device.cache.close()
    assert Device(fingerprint="other", directory=tmp_path).recall(text(21))[0] == 20
    assert (tmp_path / "model.safetensors").exists()
    assert device.cache.counts.damaged == 0


def size_of_one(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_the_disk_has_a_limit_and_leaves_go_first(tmp_path: Path) -> None:
    device = Device(num_pages=200, directory=tmp_path)
    device.remember(text(20))
    device.cache.flush()
    each = size_of_one(tmp_path)
    device = Device(num_pages=200, directory=tmp_path, disk_bytes=4 * each + each // 2)
    for seed in range(1, 4):
        device.remember([*text(20), *text(18, seed)])
        device.cache.flush()
    device.recall([*text(20), *text(18, 1), 0])  # used
    device.cache.flush()
    device.remember([*text(20), *text(18, 9)])
    device.cache.flush()
    assert device.cache.counts.evicted_disk == 1
    restarted = Device(num_pages=200, directory=tmp_path)
    found = [restarted.cache.match([*text(20), *text(18, seed), 0]).n for seed in (1, 2, 3, 9)]
    assert found == [38, 20, 38, 38]
    assert restarted.cache.nbytes()["disk"] <= 4 * each + each // 2


def test_larger_than_the_limit_is_not_kept_on_disk(tmp_path, caplog) -> None:
    device = Device(directory=tmp_path, disk_bytes=100)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            device.remember(text(20, seed))
        device.cache.close()
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(caplog.records) == 1


@settings(max_examples=15, deadline=None)
@given(data=st.data(), page_size=st.sampled_from([3, 4, 8]), where=st.sampled_from(["cpu", "disk", "both"]))
def test_any_use_gives_what_a_dictionary_would(tmp_path_factory, data, page_size, where) -> None:
    """As in test_device.py, with little memory below, restarts and somebody who deletes files."""
    folder = tmp_path_factory.mktemp("store") if where != "cpu" else None
    options: dict[str, Any] = {"directory": folder, "disk_bytes": data.draw(st.sampled_from([3000, 6000, MUCH]))}
    options["cpu_bytes"] = data.draw(st.sampled_from([300, 800, MUCH])) if where != "disk" else 0
    num_slots = data.draw(st.integers(3, 6))

    def start() -> Device:
        return Device(num_pages=24 // page_size + 12, page_size=page_size, num_slots=num_slots, **options)

    device, kept = start(), {}
    for step in range(data.draw(st.integers(1, 20))):
        words = data.draw(st.lists(st.sampled_from([(1,), (2, 3), tuple(range(4, 11))]), min_size=1, max_size=5))
        tokens = [token for word in words for token in word]
        request = device.request(tokens, flavour=step)
        n = request.resume()
        if n:
            assert any(same(request.content(), one) for one in kept[tuple(tokens[:n])])
        for stop in sorted(data.draw(st.sets(st.integers(n + 1, len(tokens)), max_size=2))):
            request.read(stop)
            if request.add() is not None and request.after.n == stop:
                kept.setdefault(tuple(tokens[:stop]), []).append(request.content())
        request.end()
        device.check()
        what = data.draw(st.sampled_from(["", "", "free", "restart", "delete", "flush"]))
        if what == "free":
            device.cache.free(data.draw(st.integers(0, 12)), data.draw(st.integers(0, num_slots - 1)))
        elif what == "restart":
            device.cache.close()
            assert device.pages.num_used == device.slots.num_used == 0
            device = start()
        elif what == "flush":
            device.cache.flush()
        elif what == "delete" and folder:
            for file in sorted(folder.glob("*.safetensors"))[:1]:
                file.unlink()
        assert device.cache.nbytes()["cpu"] <= options["cpu_bytes"]
        for snapshot in device.cache.tree:
            assert not (snapshot.is_below and snapshot.parent) or snapshot.parent.is_below
    device.cache.close()
    assert device.pages.num_used == device.slots.num_used == 0
