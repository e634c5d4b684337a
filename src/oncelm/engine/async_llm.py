"""The engine for asyncio: each request is an asynchronous generator, in whatever task, event loop or thread."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import torch

from oncelm.data.encoding import encode_prompt
from oncelm.engine.intake import Prompt
from oncelm.engine.llm import LLM
from oncelm.engine.metrics import MetricsReport
from oncelm.engine.outputs import RequestOutput
from oncelm.engine.params import SamplingParams, as_params
from oncelm.engine.thread import EngineStopped, EngineThread, Mailbox


class AsyncLLM:
    """An `LLM` whose engine runs in a thread of its own.

        async with AsyncLLM("path/to/model") as llm:
            async for output in llm.generate("It was", SamplingParams(max_tokens=100)):
                print(output.outputs[0].text)

    Args:
        model, tokenizer, options: those of `LLM`.
    """

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        self._llm = LLM(model, tokenizer, **options)
        self._thread = EngineThread(self._llm.engine)
        if self._llm.model.device.type == "cuda":  # kernels are launched on their thread's device
            self._thread.call(partial(torch.cuda.set_device, self._llm.model.device))
        self._numbers = itertools.count()
        weakref.finalize(self, self._thread.stop)  # where nobody closes it

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answer to a prompt, as it comes.

        An output has all text and tokens so far, or the new ones alone (`sampling_params.output_kind`). A reader that
        is slower than the engine finds in one output what has come meanwhile: nothing waits for it, nothing piles up.

        The request is aborted when the generator is closed, its task is cancelled or its event loop is closed: its
        memory is free before the next step.

        Args:
            prompt: text, token ids, or {"prompt_token_ids": ids}.
            request_id: in the outputs, and for `abort`; None: a number.
            priority: smaller ones come first.
            cache_salt: what was read is shared among requests of the same salt only.

        Raises:
            ValueError: a request that the engine refuses.
            EngineStopped: the engine was closed, or has failed.
        """
        engine, params = self._llm.engine, as_params(sampling_params)
        add = partial(engine.add_request, priority=priority, cache_salt=cache_salt, arrival_time=engine.clock())
        mailbox = Mailbox(request_id or f"async-{next(self._numbers)}", params.output_kind == "final_only")
        prompt = await self._encode(prompt)
        self._thread.add(mailbox, partial(add, mailbox.request_id, prompt, params))
        earlier = None
        try:
            while earlier is None or not earlier.finished:
                newest = await mailbox.take()
                yield newest.read(since=earlier if params.output_kind == "delta" else None)
                earlier = newest
        finally:
            self._thread.give_up(mailbox)

    async def read(self, document: Prompt, *, cache_salt: str | None = None) -> int:
        """Read a text into the prefix cache, as `LLM.read` does: its number of tokens.

        Raises:
            ValueError: there is no prefix cache, or the document does not fit.
            MemoryError: memory ran out while it was read.
            EngineStopped: the engine was closed before it was read, or has failed.
        """
        engine = self._llm.engine
        mailbox = Mailbox(f"document-{next(self._numbers)}", only_finished=True)
        document = await self._encode(document)
        self._thread.add(mailbox, partial(engine.add_document, mailbox.request_id, document, cache_salt=cache_salt))
        try:
            output = (await mailbox.take()).read()
        finally:
            self._thread.give_up(mailbox)
        if output.outputs[0].finish_reason == "abort":
            raise EngineStopped("the engine was closed before the document was read.")
        if output.outputs[0].error is not None:
            raise MemoryError(output.outputs[0].error)
        return len(output.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        """End a request, from any task or thread: its last output says "abort". An unknown id is ignored."""
        self._thread.abort(request_id)

    async def metrics(self) -> MetricsReport:
        """What was counted and measured since the start."""
        return await asyncio.wrap_future(self._thread.call(self._llm.metrics))

    async def close(self, timeout: float | None = None) -> None:
        """Take no more requests, wait until those that run have ended, and give the memory back.

        Args:
            timeout: seconds, after which those that still run are aborted; None: they take the time they need.
        """
        self._thread.close(timeout)
        await asyncio.shield(asyncio.wrap_future(self._thread.ended))

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        await self.close(timeout=None if kind is None else 0)

    async def _encode(self, prompt: Prompt) -> Prompt:
        """Text with its ids, made in another thread: neither the event loop nor the engine waits for a long one."""
        tokenizer = self._llm.tokenizer
        if not isinstance(prompt, str) or tokenizer is None or not prompt:
            return prompt
        ids = await asyncio.to_thread(encode_prompt, tokenizer, prompt)
        return {"prompt": prompt, "prompt_token_ids": ids}
