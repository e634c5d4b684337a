"""Replaying a workload on an address that speaks OpenAI's protocol: streaming completions, as they come in."""

from __future__ import annotations

import asyncio
import codecs
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from oncelm.bench.serve.play import Answer, Player, Progress
from oncelm.bench.serve.workload import Conversation
from oncelm.engine.outputs import RequestMetrics
from oncelm.utils.errors import shown
from oncelm.utils.settings import parse_json

if TYPE_CHECKING:
    import aiohttp

_EVENT_END = re.compile(r"\r\n\r\n|\n\n|\r\r")


class EventStream:
    """Server-sent events (the HTML standard's), as far as OpenAI's protocol uses them: the data of each event.

    Bytes may be cut anywhere, within a character too.

    >>> events = EventStream()
    >>> [*events.feed(b"data: on"), *events.feed(b"e\\n\\n: a comment\\n\\ndata: two\\n\\n")]
    ['one', 'two']
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""

    def feed(self, received: bytes) -> Iterator[str]:
        *events, self._rest = _EVENT_END.split(self._rest + self._decode(received))
        for event in events:
            fields = (line.partition(":") for line in event.splitlines())
            data = [value.removeprefix(" ") for name, _, value in fields if name == "data"]
            if data:
                yield "\n".join(data)


@dataclass(frozen=True)
class Address:
    """Where completions are asked for.

    Attributes:
        url: of the API, ending in /v1.
        model: as it is named there.
        headers: of each request.
        ignore_eos: ask for answers as long as the workload says, and for their token ids. Both are vLLM's additions to
            the protocol; without, nothing beyond OpenAI's is sent.
        timeout: seconds without a byte after which a request has failed.
    """

    url: str
    model: str
    headers: dict[str, str]
    ignore_eos: bool = True
    timeout: float = 3600.0

    def body(self, prompt: list[int] | str, max_tokens: int) -> dict[str, Any]:
        more = {"ignore_eos": True, "return_token_ids": True} if self.ignore_eos else {}
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }

    def session(self) -> AbstractAsyncContextManager[aiohttp.ClientSession]:
        """As many connections as there are requests."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=self.timeout)
        return aiohttp.ClientSession(
            headers=self.headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
        )


def api_root(url: str) -> str:
    """The address of an API from what was given: http://HOST:PORT alone stands for /v1 there.

    >>> api_root("http://127.0.0.1:8000"), api_root("https://host/proxy/v1/")
    ('http://127.0.0.1:8000/v1', 'https://host/proxy/v1')
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--url must be such as http://127.0.0.1:8000, got {shown(url)}.")
    if "@" in parts.netloc:  # it would stand in the record
        raise ValueError("--url must have no user or password in it; name the key's variable by --api-key-env.")
    root = url.rstrip("/").removesuffix("/completions")
    return root if parts.path.strip("/") else f"{root}/v1"


async def find_model(url: str, headers: dict[str, str]) -> str:
    """The first model that an API lists; ConnectionError where it does not answer so."""
    import aiohttp

    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=30)) as session,
            session.get(f"{url}/models") as response,
        ):
            response.raise_for_status()
            return str((await response.json(content_type=None))["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise ConnectionError(f"{url}/models does not list models: {_told(error)}") from error


async def replay(
    address: Address,
    conversations: Sequence[Conversation],
    *,
    vocab_size: int,
    seed: int = 0,
    name: str = "requests",
) -> list[Answer]:
    """Replay on an address, greedily: one answer a turn, in the order of conversations.

    Times are of this process. Where a turn fails, its conversation ends.

    Args:
        vocab_size: ids of made-up texts are below it.
        name: of the progress bar.
    """
    with Progress(conversations, name) as progress:
        async with address.session() as session:
            start = time.monotonic()
            players = [Player(number, one, vocab_size, seed) for number, one in enumerate(conversations)]
            plays = await asyncio.gather(*(_play(session, address, player, start, progress) for player in players))
    return [answer for answers in plays for answer in answers]


async def _play(
    session: aiohttp.ClientSession, address: Address, player: Player, start: float, progress: Progress
) -> list[Answer]:
    """One conversation, from its arrival on."""
    answers: list[Answer] = []
    due = start + player.conversation.arrival
    while (turn := player.next_turn()) is not None:
        await asyncio.sleep(due + turn.think - time.monotonic())
        reply = Reply(Answer(player.number, player.turn, RequestMetrics(due + turn.think)))
        await reply.receive(session, address, address.body(player.prompt(), turn.output))
        answers.append(reply.answer)
        progress.add(reply.answer, player.turns_left if reply.answer.error else 1)
        if reply.answer.error:
            break
        player.answered(reply.text, reply.token_ids, reply.answer.num_output_tokens)
        due = time.monotonic()
    return answers


class Reply:
    """A streamed completion on its way.

    Attributes:
        answer: times and counts, complete once `receive` returns.
        text, token_ids: of the answer; None: the ids are not told.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.text = ""
        self.token_ids: list[int] | None = None
        self._usage: dict[str, Any] = {}
        self._ended = False

    async def receive(self, session: aiohttp.ClientSession, address: Address, body: dict[str, Any]) -> None:
        """Ask, and take what comes; whatever goes wrong is in `answer.error`."""
        import aiohttp

        events = EventStream()
        try:
            async with session.post(f"{address.url}/completions", json=body) as response:
                if response.status != 200:
                    raise ConnectionError(f"HTTP {response.status}: {shown((await response.text()).strip())}")
                async for received in response.content.iter_any():
                    now = time.monotonic()
                    for data in events.feed(received):
                        self.take(data, now)
            if not self._ended:
                raise ConnectionError("the stream ended before the answer did")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            self.answer.error = _told(error)
        self._count()

    def take(self, data: str, now: float) -> None:
        """An event that came at `now`; ValueError: it tells of an error, or is none of the protocol's."""
        if data == "[DONE]":
            return
        event = parse_json(data)
        if not isinstance(event, dict):
            raise ValueError(f"an event that is no object: {shown(data)}")
        if event.get("error"):
            raise ValueError(f"the server says: {shown(event['error'])}")
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            if not isinstance(choice, dict):
                raise ValueError(f"a choice that is no object: {shown(choice)}")
            text, token_ids = choice.get("text") or "", choice.get("token_ids") or []
            if token_ids:
                self.token_ids = (self.token_ids or []) + token_ids
            if text or token_ids:
                self.text += text
                self.answer.times.token_times += [now] * max(1, len(token_ids))
            if choice.get("finish_reason") is not None:
                self._ended = True
                self.answer.times.finished_time = now

    def _count(self) -> None:
        answer, usage = self.answer, self._usage
        times = answer.times
        times.first_token_time = times.token_times[0] if times.token_times else None
        times.finished_time = None if answer.error else times.finished_time
        answer.num_prompt_tokens = usage.get("prompt_tokens", 0)
        answer.num_output_tokens = usage.get("completion_tokens", len(times.token_times))
        answer.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
