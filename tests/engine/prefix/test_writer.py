"""Work in a thread of its own."""

from __future__ import annotations

import os
import threading

from oncelm.engine.prefix.writer import Writer


def test_a_forked_process_has_a_thread_of_its_own(monkeypatch) -> None:
    """Its parent's is not there, and would be waited for for ever."""
    writer, gate, done = Writer(100), threading.Event(), []
    writer.submit(lambda: done.append(gate.wait(60)), 100)
    assert not writer.submit(done.clear, 1)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert writer.submit(lambda: done.append("here"), 1)
    writer.flush()
    assert done == ["here"]
    gate.set()
    writer.close()
