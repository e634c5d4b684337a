"""Random lives of an engine, each from one number: what is asked when, with how little memory, and what goes wrong.

Run one again as a failure names it, `draw_schedule(1234, ('hybrid',), 30)`:

    python -m tests.engine.schedules 1234 30 hybrid
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from itertools import zip_longest
from typing import Any
from unittest import mock

import torch

from oncelm.data.tokenizers import load_tokenizer
from oncelm.engine import engine as engine_module
from oncelm.engine.engine import Engine
from oncelm.engine.options import EngineOptions
from oncelm.engine.params import SamplingParams
from oncelm.engine.pool import Pool
from oncelm.engine.prefix import cache as prefix_cache
from oncelm.engine.prefix import header, tree
from oncelm.utils.device import resolve_kv_dtype
from tests.engine.answers import EOS, LONGEST, NAMES, Answer, answer, prompts, tiny_model
from tests.models.small import VOCAB

MOST_STEPS = 3000  # a schedule that takes more waits for ever
ALONE: dict[str, Any] = {"enable_prefix_caching": False, "max_num_seqs": 8, "kv_cache_bytes": 1 << 20, "verbose": False}
VARIED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.5, "seed": 2, "top_k": 9, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 3, "frequency_penalty": 1.0, "min_tokens": 1},
)


@dataclass(frozen=True)
class Ask:
    """A request: when it comes, when its client leaves, and what `answer` it has to give.

    Attributes:
        comes: step of the engine.
        leaves: step; None: it stays.
        text: the prompt that the answer is known of; `given` tokens of that are in the prompt already.
        most: tokens of the answer, by max_tokens or the model's length.
        is_document: it is only to be read.
    """

    comes: int
    leaves: int | None
    text: tuple[int, ...]
    given: int
    params: SamplingParams
    priority: int
    salt: str | None
    most: int
    is_document: bool

    @property
    def prompt_length(self) -> int:
        return len(self.text) + self.given

    @property
    def is_plain(self) -> bool:
        """Whether its tokens are those of `model.generate`."""
        return self.params.is_greedy and not self.params.has_penalties and not self.params.min_tokens


@dataclass(frozen=True)
class Schedule:
    """All that happens to an engine.

    Attributes:
        drawn: how to draw it again.
        drafts: None, "lookup" or "mixed" (MixedDrafts).
        returns_early: a step tells what the one before gave, as on a GPU.
        block: tokens of a digest of the prefix cache.
        has_text: the engine has a tokenizer, and some answers end at a stop string.
        lives: of one engine each, on the same folder if it is `on_disk`; one after the other, or `together`.
    """

    drawn: str
    seed: int
    name: str
    options: dict[str, Any]
    num_pages: int
    drafts: str | None
    on_disk: bool
    returns_early: bool
    block: int
    together: bool
    has_text: bool
    lives: tuple[tuple[Ask, ...], ...]


@dataclass
class Record:
    """What came of a schedule: digests of the logits of each pass, and counts."""

    digests: list[str] = field(default_factory=list)
    compared: int = 0
    doubtful: int = 0
    failed: int = 0
    counts: dict[str, int] = field(default_factory=dict)


def draw_schedule(seed: int, names: tuple[str, ...] = NAMES, num_prompts: int = 200) -> Schedule:
    """The schedule of a number."""
    draw = random.Random(seed)
    name = draw.choice(names)
    page_size = draw.choice((1, 2, 3, 4, 4, 5, 8, 8, 16))
    has_text = draw.random() < 0.3
    lives = tuple(tuple(_asks(draw, name, num_prompts, has_text)) for _ in range(draw.choice((1, 1, 1, 1, 2, 3))))
    asks = [ask for life in lives for ask in life]
    longest = max(ask.prompt_length + ask.most for ask in asks)
    lives = tuple(tuple(_without_limit(draw, ask, longest) for ask in life) for life in lives)
    most = -(-longest // page_size)
    max_num_seqs = draw.choice((1, 2, 2, 3, 4, 8))
    options = {
        "max_model_len": longest,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(max_num_seqs, draw.choice((1, 4, 8, 8, 16, 40, 40, 200))),
        "max_prefill_tokens_beside_decodes": draw.choice((None, 2, 7, 30)),
        "page_size": page_size,
        "kv_cache_dtype": draw.choice(("auto",) * 9 + ("int8",)),
        "enable_prefix_caching": draw.random() < 0.85,
        "num_snapshots": draw.choice((0, 1, 2, 3, 6, 20)),
        "snapshot_interval": draw.choice((2, 5, 8, 10, 8192, 8192)),
        "cpu_cache_bytes": draw.choice((0, 0, 20_000, 1 << 30)),
        "disk_cache_bytes": draw.choice((None, None, 40_000)),
    }
    drafts = draw.choice((None, "lookup", "mixed"))
    if drafts:
        options["speculative"] = {"method": "prompt_lookup", "num_tokens": draw.choice((1, 2, 5, 7))}
    pages = 1 + draw.choice((most, most, most + 2, int(1.5 * most) + 1, 3 * most, 10 * most))
    on_disk, early = draw.random() < 0.3 or len(lives) > 1, draw.random() < 0.3
    block, together = draw.choice((3, 4, 8, 256)), draw.random() < 0.4
    drawn = f"draw_schedule({seed}, {names}, {num_prompts})"
    return Schedule(drawn, seed, name, options, pages, drafts, on_disk, early, block, together, has_text, lives)


def _without_limit(draw: random.Random, ask: Ask, longest: int) -> Ask:
    """Perhaps the same with an answer that ends where the model's length does."""
    room = longest - ask.prompt_length
    if not ask.is_plain or room > LONGEST - ask.given or draw.random() < 0.5:
        return ask
    return replace(ask, params=replace(ask.params, max_tokens=None), most=room)


def _asks(draw: random.Random, name: str, num_prompts: int, has_text: bool) -> list[Ask]:
    favourite, crowd = draw.randrange(num_prompts), draw.choice((1, 3, 10, 20))
    found = []
    for _ in range(draw.choice((1, 2, 3, 4, 4, 6))):
        which = favourite if draw.random() < 0.5 else draw.randrange(num_prompts)
        text = prompts(name, which)
        known = answer(name, text).tokens
        given = draw.choice((0, 0, draw.randrange(len(known))))
        given = min(given, LONGEST - 6)
        comes = draw.randrange(crowd)
        leaves = comes + draw.randrange(25) if draw.random() < 0.12 else None
        params = SamplingParams(
            **draw.choice(({"temperature": 0},) * 15 + VARIED),
            max_tokens=draw.choice((1, 2, 4, 6)),
            n=draw.choice((1, 1, 1, 1, 2, 3, 5)),
            stop_token_ids=[draw.choice(known)] if draw.random() < 0.2 else None,
            stop=_stop(draw, known[given:]) if has_text else None,
            logprobs=draw.choice((None, None, None, 2)),
            prompt_logprobs=draw.choice((None,) * 9 + (1,)),
        )
        salt, priority, is_document = (
            draw.choice((None,) * 3 + ("a", "b")),
            draw.choice((0, 0, 0, 1, -1)),
            draw.random() < 0.1,
        )
        assert params.max_tokens is not None
        found.append(Ask(comes, leaves, text, given, params, priority, salt, params.max_tokens, is_document))
    return found


@cache
def answer_alone(name: str, prompt: tuple[int, ...], params: SamplingParams, dtype: str) -> list[tuple[int, ...]]:
    """What an engine that has nothing else to do answers: the tokens of each of its n answers."""
    options = EngineOptions(max_model_len=100, page_size=16, kv_cache_dtype=dtype, **ALONE)
    engine = Engine(tiny_model(name), load_tokenizer("bytes") if params.stop else None, options)
    engine.add_request("alone", list(prompt), params)
    outputs = []
    while engine.has_unfinished():
        outputs = engine.step() or outputs
    return [tuple(one.token_ids) for one in outputs[0].outputs]


def _stop(draw: random.Random, tokens: tuple[int, ...]) -> list[str] | None:
    """Perhaps a stop string: a few characters of what is coming, or the like."""
    start = draw.randrange(len(tokens))
    text = text_of(tokens[start : start + draw.randint(1, 3)])
    can_be = text and "\0" not in text  # which no text of a user may have
    return [text, text[:1] + "?"] if can_be and draw.random() < 0.7 else None


def text_of(tokens: tuple[int, ...]) -> str:
    """What the tokenizer of bytes makes of ids that a tiny model has: a character each, of special tokens none."""
    return "".join(chr(token - 4) for token in tokens if token >= 4)


class MixedDrafts:
    """Drafts of which some are right: the true answer with errors, nothing, or anything at all."""

    def __init__(self, seed: int, known: Callable[[list[int]], list[int]]) -> None:
        self.seed, self.known = seed, known

    def propose(self, tokens: list[int], max_drafts: int) -> list[int]:
        draw = random.Random(f"{self.seed} {tokens}")
        if max_drafts < 1 or draw.random() < 0.2:
            return []
        drafts = [*self.known(tokens), *(draw.randrange(VOCAB) for _ in range(max_drafts))]
        wrong = draw.choice((0.0, 0.1, 0.5))
        drafts = [draw.randrange(VOCAB) if draw.random() < wrong else token for token in drafts]
        return drafts[: draw.randint(1, max_drafts)]


class Life:
    """An engine under a schedule, watched from outside: each token, each logit, each page and slot."""

    may_fail = False  # answers may end with an error, but never with a wrong token

    def __init__(self, schedule: Schedule, asks: tuple[Ask, ...], folder: str | None, record: Record) -> None:
        self.schedule, self.asks, self.record = schedule, asks, record
        model, now = tiny_model(schedule.name), [0.0]
        page_size, seats = schedule.options["page_size"], schedule.options["max_num_seqs"]
        kept = schedule.options["num_snapshots"] if schedule.options["enable_prefix_caching"] else 0
        dtype = resolve_kv_dtype(schedule.options["kv_cache_dtype"])
        memory = schedule.num_pages * Pool.page_bytes(model.config, page_size, model.dtype, dtype)
        memory += (1 + seats + kept) * Pool.slot_bytes(model.config, model.dtype, dtype)

        def clock() -> float:
            now[0] += 0.125
            return now[0]

        options = EngineOptions(**schedule.options, kv_cache_bytes=memory, cache_dir=folder, verbose=False)
        self.engine = Engine(model, load_tokenizer("bytes") if schedule.has_text else None, options, clock=clock)
        self.engine.returns_at_launch = schedule.returns_early
        self.is_quantised = dtype is not None
        self.known: dict[tuple[int, ...], tuple[Answer, int]] = {}
        self.seen: dict[str, list[tuple[int, ...]]] = {}
        self.finished: set[str] = set()
        self.documents: set[str] = set()
        self._watch_logits()

    def _watch_logits(self) -> None:
        sampler = self.engine.sampler

        read = sampler.read

        def watched(choice: Any) -> Any:
            self.record.digests.append(blake2b(choice.logits.numpy().tobytes(), digest_size=8).hexdigest())
            for row, found in zip(choice.rows, choice.logits, strict=True):
                if len(row.output) >= row.index:  # else it has ended before, or what led there was lost
                    self._check_logits([*row.prompt], [*row.output[: row.index]], found)
            return read(choice)

        sampler.read = watched

    def _check_logits(self, prompt: list[int], output: list[int], found: torch.Tensor) -> None:
        if self.is_quantised:
            return
        known, given = self.known[tuple(prompt)]
        place = given + len(output)
        if place < len(known.tokens) and tuple(output) == known.tokens[given:place]:
            off = float((found - known.logits[place]).abs().max())
            assert off <= 100 * known.error, f"logits behind {len(prompt)} + {len(output)} tokens are off by {off}"

    def propose(self, tokens: list[int]) -> list[int]:
        """What truly follows, for MixedDrafts."""
        for prompt, (known, given) in self.known.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                return list(known.tokens[given + len(tokens) - len(prompt) :])
        return []

    def step(self) -> list[Any]:
        return self.engine.step()

    def run(self) -> Iterator[None]:
        """To its end, step by step."""
        step = 0
        while True:
            for number, ask in enumerate(self.asks):
                if ask.comes == step:
                    self._add(str(number), ask)
                if ask.leaves == step:
                    self.engine.abort_request(str(number))
            if not self.engine.has_unfinished() and step >= max(ask.comes for ask in self.asks):
                break
            for output in self.step():
                self._check(self.asks[int(output.request_id)], output)
            self._check_memory()
            step += 1
            assert step < MOST_STEPS, "it waits for ever"
            yield
        assert len(self.finished) == len(self.asks), "a request was never finished"
        self._finish()

    def _add(self, name: str, ask: Ask) -> None:
        known = answer(self.schedule.name, ask.text)
        prompt = (*ask.text, *known.tokens[: ask.given])
        self.known[prompt] = (known, ask.given)
        self.seen[name] = [()] * ask.params.n
        options: dict[str, Any] = {"priority": ask.priority, "cache_salt": ask.salt}
        if ask.is_document and self.engine.cache is not None:
            self.engine.add_document(name, list(prompt), **options)
            self.documents.add(name)
        else:
            self.engine.add_request(name, list(prompt), ask.params, **options)

    def _check(self, ask: Ask, output: Any) -> None:
        seen = self.seen[output.request_id]
        for one in output.outputs:
            tokens = tuple(one.token_ids)
            assert tokens[: len(seen[one.index])] == seen[one.index], "tokens were taken back"
            seen[one.index] = tokens
            if one.finish_reason == "error":
                assert self.may_fail, one.error
                assert one.error
            elif one.finish_reason == "abort":
                assert ask.leaves is not None
            if ask.params.logprobs is not None:
                assert [token in place for token, place in zip(tokens, one.logprobs or (), strict=True)] == [
                    True
                ] * len(tokens)
        check = self._is_as_generated if ask.is_plain and not self.is_quantised else self._is_as_alone
        if output.request_id in self.documents:
            check = self._is_read
        right = [check(ask, output.prompt_token_ids, one) for one in output.outputs]
        assert output.finished == all(one.finished for one in output.outputs)
        if output.finished:
            self.finished.add(output.request_id)
            self.record.compared += 1
            self.record.doubtful += not all(right)
            self.record.failed += any(one.finish_reason == "error" for one in output.outputs)
            self._check_prompt_logprobs(ask, output)

    def _is_as_generated(self, ask: Ask, prompt: list[int], one: Any) -> bool:
        """False where rounding may decide."""
        known, tokens = answer(self.schedule.name, ask.text), tuple(one.token_ids)
        expected, reason, stop = _expected(ask, known)
        sure = max(0, known.sure - ask.given)
        assert tokens[:sure] == expected[: min(len(tokens), sure)], f"{tokens} is not {expected}"
        if one.finish_reason in ("stop", "length") and len(expected) <= sure:
            assert (tokens, one.finish_reason, one.stop_reason) == (expected, reason, stop)
            if self.schedule.has_text:
                text = text_of(tokens[:-1] if reason == "stop" and not isinstance(stop, str) else tokens)
                assert one.text == (text[: text.index(stop)] if isinstance(stop, str) else text)
        return len(expected) <= sure

    def _is_read(self, ask: Ask, prompt: list[int], one: Any) -> bool:
        assert not one.token_ids
        assert one.finish_reason in (None, "stop", "abort", "error")
        return True

    def _is_as_alone(self, ask: Ask, prompt: list[int], one: Any) -> bool:
        """The same for draws and penalties, where any token may hang on rounding."""
        params = replace(ask.params, max_tokens=ask.most)
        alone = answer_alone(self.schedule.name, tuple(prompt), params, self.schedule.options["kv_cache_dtype"])
        expected, tokens = alone[one.index], tuple(one.token_ids)
        if one.finish_reason in ("stop", "length"):
            return tokens == expected
        return tokens == expected[: len(tokens)]

    def _check_prompt_logprobs(self, ask: Ask, output: Any) -> None:
        whole = all(one.finish_reason in ("stop", "length") for one in output.outputs)
        if ask.params.prompt_logprobs is None or not whole or self.is_quantised or output.request_id in self.documents:
            return
        prompt = output.prompt_token_ids
        with torch.no_grad():
            expected = tiny_model(self.schedule.name)(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
        first, *others = output.prompt_logprobs
        assert first is None
        found = [place[token].logprob for place, token in zip(others, prompt[1:], strict=True)]
        exact = [float(line[token]) for line, token in zip(expected, prompt[1:], strict=False)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(exact), rtol=1e-3, atol=1e-3)

    def _check_memory(self) -> None:
        """Every page and slot is held by exactly those who say so."""
        engine = self.engine
        engine.pages.check()
        engine.slots.check()
        held = [0] * engine.pages.num_pages
        snapshots = [one for one in engine.cache.tree if one.slot] if engine.cache is not None else []
        holders = [one for one in engine.scheduler.running if one.slot]
        for one in (*holders, *snapshots):
            for page in one.pages:
                held[page] += 1
        assert held == [engine.pages.references(page) for page in range(engine.pages.num_pages)]
        slots = sorted(one.slot for one in (*holders, *snapshots))
        assert len(set(slots)) == len(slots) == engine.slots.num_used

    def _finish(self) -> None:
        engine = self.engine
        assert not engine.scheduler.running
        assert not engine.scheduler.num_waiting
        if engine.cache is not None:
            engine.cache.flush()
            assert not engine.cache.counts.damaged
            # two that run at once may have computed the same text with other bits, of which one goes to the disk
            may_be_refused = self.schedule.options["disk_cache_bytes"] or self.schedule.together
            assert may_be_refused or not engine.cache.counts.not_written
        counts = engine.metrics().counts
        for name in ("preemptions", "cached_tokens", "drafts_accepted", "drafts_proposed", "steps"):
            self.record.counts[name] = self.record.counts.get(name, 0) + getattr(counts, name)
        engine.close()
        assert engine.pages.num_used == engine.slots.num_used == 0, "pages or slots leak"


def _expected(ask: Ask, known: Answer) -> tuple[tuple[int, ...], str, int | str | None]:
    """Tokens, finish_reason and stop_reason of an answer."""
    tokens = known.tokens[ask.given : ask.given + ask.most]
    for i, token in enumerate(tokens):
        if token == EOS:
            return tokens[: i + 1], "stop", None
        if token in (ask.params.stop_token_ids or ()):
            return tokens[: i + 1], "stop", token
        for stop in ask.params.stop or ():
            if stop in text_of(tokens[: i + 1]):
                return tokens[: i + 1], "stop", stop
    return tokens, "length", None


def run_schedule(schedule: Schedule, kind: type[Life] = Life) -> Record:
    """Let it happen, and check all of it; AssertionError says how to draw it again."""
    record, lives, original = Record(), [], engine_module.PromptLookup

    def follows(tokens: list[int]) -> list[int]:
        return next((found for life in lives if (found := life.propose(tokens))), [])

    def begin(asks: tuple[Ask, ...], folder: str | None) -> Iterator[None]:
        lives.append(kind(schedule, asks, folder, record))
        return lives[-1].run()

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        for module in (tree, prefix_cache, header):
            stack.enter_context(mock.patch.object(module, "BLOCK", schedule.block))
        drafter = (
            (lambda: MixedDrafts(schedule.seed, follows)) if schedule.drafts == "mixed" else (lambda: original(2, 1))
        )
        stack.enter_context(mock.patch.object(engine_module, "PromptLookup", drafter))
        place = folder if schedule.on_disk else None
        try:
            if schedule.together:
                for _ in zip_longest(*[begin(asks, place) for asks in schedule.lives]):
                    pass
            else:
                for asks in schedule.lives:
                    for _ in begin(asks, place):
                        pass
        except Exception as error:
            raise AssertionError(f"{schedule.drawn}: {error!r}") from error
    return record


if __name__ == "__main__":
    chosen = draw_schedule(int(sys.argv[1]), tuple(sys.argv[3:]), int(sys.argv[2]))
    print(chosen)
    print(run_schedule(chosen))
