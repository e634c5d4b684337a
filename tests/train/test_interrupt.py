"""A signal asks a run to stop; its echo changes nothing; a later one acts as without us."""

from __future__ import annotations

import signal

import pytest

from oncelm.train import interrupt
from oncelm.train.interrupt import StopRequest

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@BOTH
def test_one_stop_may_arrive_twice(number) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested


@BOTH
def test_a_later_signal_acts_as_before(number, monkeypatch) -> None:
    monkeypatch.setattr(interrupt, "ECHO_SECONDS", -1.0)
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with StopRequest():
            signal.raise_signal(number)
            assert acted == []
            signal.raise_signal(number)
            assert acted == [number]
    finally:
        signal.signal(number, before)
