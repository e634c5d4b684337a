"""AsyncLLM on a tiny model: the same answers, in pieces; whoever goes away leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from functools import cache
from itertools import pairwise

import pytest

import oncelm
from oncelm.engine.params import SamplingParams
from oncelm.engine.thread import EngineStopped
from tests.models.small import make_model

PROMPTS = ["It was the best of times", "it was", "the worst of times, it was the age of wisdom"]


@cache
def model():
    return make_model("retention", vocab_size=300)


def options() -> dict:
    return {"max_model_len": 2048, "max_num_seqs": 4, "kv_cache_bytes": 2**22, "verbose": False}


def params(max_tokens: int = 10, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


@cache
def expected(max_tokens: int = 10) -> list[str]:
    llm = oncelm.LLM(model(), "bytes", **options())
    return [output.outputs[0].text for output in llm.generate(PROMPTS, params(max_tokens), use_tqdm=False)]


def run(main: Callable[[oncelm.AsyncLLM], Awaitable[None]]) -> None:
    """With an engine, which must be empty at the end; 60 s are more than it needs."""

    async def whole() -> None:
        async with oncelm.AsyncLLM(model(), "bytes", **options()) as llm:
            await main(llm)
            gauges = (await llm.metrics()).gauges
            assert (gauges.num_running, gauges.num_waiting) == (0, 0)
        engine = llm._llm.engine
        assert engine.pages.num_used == engine.slots.num_used == 0

    asyncio.run(asyncio.wait_for(whole(), 60))


async def read(llm: oncelm.AsyncLLM, prompt, **more) -> list:
    return [output async for output in llm.generate(prompt, params(**more))]


async def until_it_runs(llm: oncelm.AsyncLLM) -> None:
    while not (await llm.metrics()).gauges.num_running:
        await asyncio.sleep(0.001)


def test_answers_are_those_of_the_engine() -> None:
    async def main(llm: oncelm.AsyncLLM) -> None:
        kinds = ("cumulative", "delta", "final_only")
        asked = [(prompt, kind) for kind in kinds for prompt in PROMPTS]
        found = await asyncio.gather(*(read(llm, prompt, output_kind=kind) for prompt, kind in asked))
        for (prompt, kind), outputs in zip(asked, found, strict=True):
            texts = [output.outputs[0].text for output in outputs]
            tokens = [output.outputs[0].token_ids for output in outputs]
            text = expected()[PROMPTS.index(prompt)]
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert {output.prompt for output in outputs} == {prompt}
            assert outputs[-1].outputs[0].finish_reason == "length"
            if kind == "delta":
                assert "".join(texts) == text
                assert sum(map(len, tokens)) == 10
            else:
                assert texts[-1] == text
                assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(tokens))
            assert len(outputs) == 1 or kind != "final_only"

    run(main)


@pytest.mark.parametrize("how", ["cancelled", "closed", "dropped", "before the first token", "aborted"])
def test_who_goes_away_leaves_nothing_behind(how) -> None:
    async def main(llm: oncelm.AsyncLLM) -> None:
        generator = llm.generate(PROMPTS[0], params(2000), "a")
        if how == "before the first token":
            task = asyncio.create_task(anext(generator))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        elif how == "cancelled":
            task = asyncio.create_task(read(llm, PROMPTS[0], max_tokens=2000))
            await until_it_runs(llm)
            task.cancel()
            await asyncio.wait([task])
        elif how == "closed":
            await anext(generator)
            await generator.aclose()
        elif how == "dropped":
            await anext(generator)
            del generator
            gc.collect()
            await asyncio.sleep(0)
        else:
            await anext(generator)
            llm.abort("a")
            *_, last = [output async for output in generator]
            assert last.outputs[0].finish_reason == "abort"
        counts = (await llm.metrics()).counts
        assert counts.finished in ({"abort": 1}, {})  # {}: it had not begun
        assert [output.outputs[0].text for output in await read(llm, PROMPTS[1], output_kind="final_only")] == [
            expected()[1]
        ]

    run(main)


def test_several_event_loops() -> None:
    async def main(llm: oncelm.AsyncLLM) -> None:
        found: dict[int, str] = {}

        def elsewhere(number: int) -> None:
            found[number] = asyncio.run(read(llm, PROMPTS[number % 3]))[-1].outputs[0].text

        threads = [threading.Thread(target=elsewhere, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert [found[number] for number in range(6)] == expected() * 2

    run(main)


def test_a_document_is_read_once() -> None:
    async def main(llm: oncelm.AsyncLLM) -> None:
        assert await llm.read(PROMPTS[2]) == len(PROMPTS[2])
        (output,) = await read(llm, f"{PROMPTS[2]}, it was", output_kind="final_only")
        assert output.num_cached_tokens >= len(PROMPTS[2]) - 1

    run(main)


def test_a_document_that_was_not_read_to_its_end() -> None:
    async def main() -> None:
        llm = oncelm.AsyncLLM(model(), "bytes", **options(), max_num_batched_tokens=4)
        reading = asyncio.create_task(llm.read([5] * 2000))
        await until_it_runs(llm)
        await llm.close(timeout=0)
        with pytest.raises(EngineStopped, match="before the document was read"):
            await reading

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_is_refused_and_what_is_closed() -> None:
    async def main() -> None:
        llm = oncelm.AsyncLLM(model(), "bytes", **options())
        for prompt, reason in (("", "empty"), ([1, 999], "token ids"), ("x" * 3000, "at most 2,047 fit")):
            with pytest.raises(ValueError, match=reason):
                await read(llm, prompt)
        long = asyncio.create_task(read(llm, PROMPTS[0], max_tokens=2000))
        await until_it_runs(llm)
        await llm.close(timeout=0.01)
        assert (await long)[-1].outputs[0].finish_reason == "abort"
        with pytest.raises(EngineStopped, match="closed"):
            await read(llm, PROMPTS[0])
        await llm.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_engine_that_fails_tells_all(monkeypatch) -> None:
    async def main() -> None:
        llm = oncelm.AsyncLLM(model(), "bytes", **options())

        def fail() -> None:
            raise SystemError("broken")

        monkeypatch.setattr(llm._llm.engine, "step", fail)
        for error in await asyncio.gather(*(read(llm, prompt) for prompt in PROMPTS), return_exceptions=True):
            assert isinstance(error, EngineStopped)
            assert "broken" in str(error)
        with pytest.raises(EngineStopped, match="broken"):
            await llm.metrics()
        await llm.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_nobody_closes_it() -> None:
    async def main() -> None:
        llm = oncelm.AsyncLLM(model(), "bytes", **options())
        await read(llm, PROMPTS[1])

    asyncio.run(main())
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "oncelm-engine"]
