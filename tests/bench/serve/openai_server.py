"""As little of a server of OpenAI's protocol as a completion needs, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator


class Server:
    """Each token is an event, and a stream is cut into pieces of five bytes.

    Args:
        token_ids: tell them, as vLLM does.
        behave: "well", or how an answer to that body fails: "refuse", "hang up", "error".
    """

    def __init__(self, token_ids: bool = True, behave: Callable[[dict], str] = lambda body: "well") -> None:
        self.token_ids, self.behave = token_ids, behave
        self.bodies: list[dict] = []
        self.headers: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.headers.append(head)
        if head.startswith("GET /v1/models"):
            self.reply(writer, 200, json.dumps({"data": [{"id": "a model"}]}).encode())
        elif head.startswith("POST /v1/completions"):
            length = next(
                int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")
            )
            self.bodies.append(json.loads(await reader.readexactly(length)))
            await self.complete(writer, self.bodies[-1])
        else:
            self.reply(writer, 404, b"nothing here")
        writer.close()

    def reply(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)

    async def complete(self, writer: asyncio.StreamWriter, body: dict) -> None:
        behaviour = self.behave(body)
        if behaviour == "refuse":
            self.reply(writer, 400, b'{"error": "too long"}')
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        events: list[object] = []
        for i in range(body["max_tokens"]):
            choice = {"index": 0, "text": "né ", "finish_reason": "length" if i + 1 == body["max_tokens"] else None}
            events.append({"choices": [choice | ({"token_ids": [7]} if self.token_ids else {})]})
        if behaviour == "hang up":
            events = events[:1]
        elif behaviour == "error":
            events[1:] = [{"error": {"message": "out of memory"}}]
        else:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            events.append({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 2}}})
        stream = ": hello\r\n\r\n" + "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
        sent = (stream + ("data: [DONE]\n\n" if behaviour == "well" else "")).encode()
        for i in range(0, len(sent), 5):
            writer.write(sent[i : i + 5])
            await writer.drain()
            if i % 50 == 0:
                await asyncio.sleep(0)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Yields its address."""
        loop = asyncio.new_event_loop()
        listening = loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            listening.close()
            loop.close()
