"""A hub out of reach is told at once."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("lm_eval")

import datasets
from huggingface_hub import constants

from oncelm.eval.harness.hub import hub_answers, no_waiting_without_a_network


@pytest.fixture
def no_network(monkeypatch):
    """No machine answers, and whoever waits fails."""

    def refuse(*arguments, **options):
        raise OSError("no network here")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("time.sleep", refuse)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)


def test_nothing_is_tried_again(no_network, tmp_path) -> None:
    assert not constants.HF_HUB_OFFLINE
    with no_waiting_without_a_network(), pytest.raises(ConnectionError, match="Couldn't reach 'nobody/nothing'"):
        datasets.load_dataset("nobody/nothing", cache_dir=str(tmp_path))
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_machine_that_answers_is_asked(monkeypatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hub_answers(f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        with no_waiting_without_a_network():
            assert constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE
    assert not hub_answers(f"http://127.0.0.1:{port}")


def test_behind_a_proxy_nobody_can_tell(no_network, monkeypatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub_answers("https://huggingface.co")
    assert not hub_answers("http://huggingface.co")
