"""Replaying on an address that speaks OpenAI's protocol: streams cut anywhere, errors, servers that hang up."""

from __future__ import annotations

import asyncio

import pytest

from oncelm.bench.serve.address import Address, EventStream, api_root, find_model, replay
from oncelm.bench.serve.figures import figures
from oncelm.bench.serve.play import Answer
from oncelm.bench.serve.workload import Conversation, Turn
from tests.bench.serve.openai_server import Server

pytest.importorskip("aiohttp")


def answer(server: Server, *conversations: Conversation, ignore_eos: bool = True) -> list[Answer]:
    async def run(url: str) -> list[Answer]:
        headers = {"Authorization": "Bearer secret"}
        address = Address(url, await find_model(url, headers), headers, ignore_eos, timeout=10)
        return await replay(address, conversations, vocab_size=50)

    with server.running() as url:
        return asyncio.run(run(api_root(url)))


def test_streams_are_read() -> None:
    server = Server()
    answers = answer(
        server, Conversation((Turn(5, 3), Turn(2, 1, think=0.01))), Conversation((Turn(4, 2),), arrival=0.05)
    )
    assert [answer.error for answer in answers] == [None] * 3
    assert [(a.conversation, a.turn, a.num_prompt_tokens, a.num_output_tokens) for a in answers] == [
        (0, 0, 5, 3), (0, 1, 10, 1), (1, 0, 4, 2),
    ]  # fmt: skip
    first, second, other = answers
    assert second.times.arrival_time > first.times.finished_time
    assert other.times.arrival_time - first.times.arrival_time == pytest.approx(0.05)
    bodies = sorted(server.bodies, key=lambda body: (body["max_tokens"], len(body["prompt"])), reverse=True)
    assert {body["model"] for body in bodies} == {"a model"}
    assert bodies[0]["ignore_eos"]
    assert bodies[2]["prompt"][:8] == [*bodies[0]["prompt"], 7, 7, 7]  # the ids that the server told
    assert all("Authorization: Bearer secret" in head for head in server.headers)
    found = figures(answers)
    assert found["cached_tokens"] == 6
    assert found["queue_time"] is None
    assert found["ttft"]["count"] == 3


def test_a_server_that_tells_no_ids_and_knows_openais_fields_only() -> None:
    server = Server(token_ids=False)
    answers = answer(
        server, Conversation((Turn(5, 3), Turn(2, 1))), Conversation((Turn("Once", 2), Turn("!", 1))), ignore_eos=False
    )
    assert [answer.error for answer in answers] == [None] * 4
    assert {*server.bodies[0]} == {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    prompts = [body["prompt"] for body in server.bodies]
    assert "Oncené né !" in prompts
    assert 10 in {len(prompt) for prompt in prompts if isinstance(prompt, list)}


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("refuse", "HTTP 400"), ("hang up", "the stream ended before"), ("error", "the server says: .*out of memory")],
)
def test_what_goes_wrong_is_told(behaviour: str, message: str) -> None:
    server = Server(behave=lambda body: behaviour if body["max_tokens"] == 3 else "well")
    failed, well = answer(server, Conversation((Turn(5, 3), Turn(1, 1))), Conversation((Turn(5, 2),)))
    assert well.error is None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(failed.error)
    assert figures([failed, well])["failed"] == 1


def test_nobody_there() -> None:
    async def ask() -> None:
        await find_model("http://127.0.0.1:9/v1", {})

    with pytest.raises(ConnectionError, match="does not list models"):
        asyncio.run(ask())
    with pytest.raises(ValueError, match="--url must be such as http"):
        api_root("127.0.0.1:8000")
    with pytest.raises(ValueError, match="no user or password"):
        api_root("https://me:secret@127.0.0.1:8000")


def test_events_come_out_whole_wherever_bytes_are_cut() -> None:
    stream = 'data: {"a": "né"}\r\n\r\n: ping\n\nevent: x\ndata: one\ndata: two\n\ndata:three\r\n\r\n'.encode()
    expected = ['{"a": "né"}', "one\ntwo", "three"]
    for size in range(1, len(stream) + 1):
        events = EventStream()
        found = [event for i in range(0, len(stream), size) for event in events.feed(stream[i : i + size])]
        assert found == expected, size
