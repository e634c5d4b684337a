"""The loop: add requests, schedule, run, postprocess.

On a GPU a step returns once its passes are launched, with the outputs of the step before. A row reads the token that
was chosen last where the GPU has left it (`Runner.keep`), so the next step is scheduled and launched before that token
is known here, and the GPU does not wait for Python. It does where a choice depends on the output
(`SamplingParams.looks_back`, and drafts). What was launched for a request that has ended meanwhile is thrown away.

On a CPU a step returns its own outputs.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from oncelm.engine.answers import add_text, append_token, end_tokens, places_of
from oncelm.engine.drafts import PromptLookup, can_draft
from oncelm.engine.intake import Intake, Prompt
from oncelm.engine.logprobs import prompt_logprobs
from oncelm.engine.memory import Memory
from oncelm.engine.metrics import EngineMetrics, Gauges, MetricsReport
from oncelm.engine.options import EngineOptions, Limits
from oncelm.engine.outputs import RequestOutput
from oncelm.engine.pages import Pages, Slots
from oncelm.engine.params import SamplingParams, as_params
from oncelm.engine.plan import MemoryPlan, plan_memory
from oncelm.engine.pool import Pool
from oncelm.engine.prefix import PrefixCache
from oncelm.engine.request import Request, State
from oncelm.engine.runner import Runner
from oncelm.engine.sampler import Choice, Sampler
from oncelm.engine.scheduler import Scheduler, Step
from oncelm.engine.thread import EngineStopped
from oncelm.engine.work import Piece, Row
from oncelm.models.checks import weights_digest
from oncelm.utils.device import resolve_kv_dtype
from oncelm.utils.errors import is_out_of_memory


@dataclass
class Launched:
    """Rows of a step, and their tokens, which the device is choosing.

    Attributes:
        lost: requests whose memory is lost since: their tokens do not count, and are chosen again.
    """

    rows: list[tuple[Request, Row]]
    choice: Choice
    lost: set[Request] = field(default_factory=set)


class Engine:
    """Runs requests on a YOCO, many at once.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: for prompts and answers as text; None: token ids alone.
        clock: seconds, for metrics only: what is computed does not depend on time.

    Raises:
        ValueError: too little memory for one request, with what would fit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.tokenizer, self.clock = model, tokenizer, clock
        options = options or EngineOptions()
        limits = options.limits(model.device.type)
        self.options = replace(options, **limits._asdict())
        options.make_folder()
        self.plan = plan = self._plan_memory(limits)
        self.pages, self.slots = Pages(plan.num_pages), Slots(plan.num_slots)
        self.pool, self.runner = self._take_memory(limits)
        self.eos_token_ids = end_tokens(model, tokenizer)
        self.sampler = Sampler(model.config.vocab_size, model.device, tokenizer, self.eos_token_ids)
        self.cache: PrefixCache | None = None
        if options.enable_prefix_caching:
            self.cache = PrefixCache(
                self.pool,
                self.pages,
                self.slots,
                f"{model.fingerprint()} {model.quantization} {weights_digest(model) if options.cache_dir else ''}",
                cpu_bytes=options.cpu_cache_bytes,
                directory=options.cache_dir,
                disk_bytes=options.disk_cache_bytes,
            )
        keeps_below = bool(options.cpu_cache_bytes or options.cache_dir)
        self.memory = Memory(self.pages, self.slots, plan.page_size, self.cache, keeps_below)
        self.scheduler = Scheduler(
            self.memory,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_prefill_tokens_beside_decodes=limits.max_prefill_tokens_beside_decodes,
            snapshot_interval=options.snapshot_interval,
            propose=self._propose if options.speculative is not None else None,
            read_tokens=self._read,
        )
        self.returns_at_launch = model.device.type == "cuda"
        self._has_prefilled = torch.cuda.Event() if self.returns_at_launch else None
        self._intake = Intake(tokenizer, model.config.vocab_size, self.eos_token_ids, plan, options.seed)
        self._metrics = EngineMetrics()
        self._requests: dict[str, list[Request]] = {}
        self._is_closed = False
        self._launched: deque[Launched] = deque()
        self._counts: Counter[str] = Counter()  # of what was read in a step
        self._changed: dict[Request, None] = {}  # whose outputs are to be told, in order

    def _plan_memory(self, limits: Limits) -> MemoryPlan:
        options = self.options
        plan = plan_memory(
            self.model,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            page_size=limits.page_size,
            kv_cache_dtype=options.kv_cache_dtype,
            gpu_memory_utilization=options.gpu_memory_utilization,
            kv_cache_bytes=options.kv_cache_bytes,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            num_snapshots=options.num_snapshots if options.enable_prefix_caching else 0,
        )
        if options.verbose:
            print(plan.table(), file=sys.stderr, flush=True)
        return plan

    def _take_memory(self, limits: Limits) -> tuple[Any, Any]:
        """A pool for what is kept of requests, and a runner, ready to work, for forward passes over it."""
        plan, options = self.plan, self.options
        kv_dtype = resolve_kv_dtype(options.kv_cache_dtype)
        pool = Pool(self.model, plan.num_pages, plan.page_size, plan.num_slots, kv_dtype)
        runner = Runner(self.model, pool, max_num_seqs=options.max_num_seqs, max_pages=plan.pages_a_request)
        runner.warm_up(limits.max_num_batched_tokens, drafts=options.speculative is not None)
        return pool, runner

    # -- requests -------------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
    ) -> RequestOutput:
        """Queue a request.

        Args:
            request_id: its name among those that are not finished.
            prompt: text, token ids, or {"prompt_token_ids": ids, "prompt": the text that they are of}.
            priority: smaller ones come first, and keep their memory; equal ones go by arrival.
            cache_salt: what was read is shared among requests of the same salt only.
            arrival_time: on the engine's clock; None: now.

        Raises:
            ValueError: no tokens, tokens that the model does not have, more than fit (with how many would), an id that
                is in use.
            EngineStopped: it was closed.
        """
        self._check_id(request_id)
        arrival = self.clock() if arrival_time is None else arrival_time
        requests = self._intake.requests(request_id, prompt, as_params(params), arrival, priority, cache_salt)
        self._requests[request_id] = requests
        most = self.options.max_num_seqs  # answers that go on from one reading of the prompt
        for first in range(0, len(requests), most):
            requests[first].forks = requests[first + 1 : first + most]
            self.scheduler.add(requests[first])
        return requests[0].output

    def add_document(
        self, request_id: str, document: Prompt, *, priority: int = 0, cache_salt: str | None = None
    ) -> RequestOutput:
        """Queue a text that is only read, into the prefix cache: prompts that begin with it go on from its end.

        Returns:
            what says when that is done (`finished`), or why it could not be (`outputs[0].error`).

        Raises:
            ValueError: as `add_request`, or there is no prefix cache.
        """
        if self.cache is None:
            raise ValueError("a document is read into the prefix cache: set enable_prefix_caching=True.")
        self._check_id(request_id)
        request = self._intake.document(request_id, document, self.clock(), priority, cache_salt)
        self._requests[request_id] = [request]
        self.scheduler.add(request)
        return request.output

    def num_read(self, request_id: str) -> int:
        """Tokens that are in memory of a request that is not finished; else 0."""
        requests = self._requests.get(request_id)
        return requests[0].n if requests else 0

    def _check_id(self, request_id: str) -> None:
        if self._is_closed:
            raise EngineStopped("the engine was closed: it takes no more requests.")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by a request that is not finished.")

    def abort_request(self, request_id: str) -> None:
        """End a request with what it has; its memory is free at once. Nothing happens if there is none of that name."""
        for request in self._requests.get(request_id, ()):
            self._end(request, "abort")

    def has_unfinished(self) -> bool:
        """Whether a further step would do or tell anything."""
        return bool(self._requests or self._changed or self._launched)

    # -- a step ---------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Move all requests that run by a step.

        Returns:
            The outputs that have changed; the same objects again and again, as far as they have come.

        Raises:
            what a pass raises, but for memory that ran out. Requests in it have ended with an error, the others go on.
        """
        start = self.clock()
        try:
            if not self._may_run_ahead():
                self._read()
            if self._has_prefilled is not None:
                # A request that comes waits for one piece, not for all that could be launched ahead of the GPU
                self._has_prefilled.synchronize()
            step = self.scheduler.schedule()
            has_rows = self._launch(step)
            self._read(keep=int(has_rows and self.returns_at_launch))
        except BaseException:  # an interrupt, too, may come between what was planned and what was done
            self._launched.clear()
            for request in list(self.scheduler.running):
                self.scheduler.put_back(request)
            raise
        outputs = self._tell()
        self._metrics.step(
            self.clock() - start,
            prefill_tokens=sum(len(piece.tokens) for _, piece in step.pieces),
            preemptions=step.num_preempted,
            **self._counts,
        )
        self._counts.clear()
        return outputs

    def _may_run_ahead(self) -> bool:
        """Whether rows can be planned and their tokens be chosen without the tokens before."""
        if self.options.speculative is not None:
            return False
        return not any(request.params.looks_back for launched in self._launched for request, _ in launched.rows)

    def _launch(self, step: Step) -> bool:
        """Run the passes of a step; whether there are rows. Where memory runs out, the largest request of the pass
        fails, the others lose what they have and are read again."""
        now = self.clock()
        for request, _ in (*step.pieces, *step.rows):
            if request.output.metrics.first_scheduled_time is None:
                request.output.metrics.first_scheduled_time = now
        try:
            self._prefill(step)
        except Exception as error:
            if not self._survives(error):
                self._fail([request for request, _ in (*step.pieces, *step.rows)], error)
                raise
            sizes = [(len(piece.tokens), request) for request, piece in step.pieces]
            self._recover(sizes, [fork for _, fork in step.forks])
        rows = [(request, row) for request, row in step.rows if request.state is State.WRITING]
        if not rows:
            return False
        try:
            for _, row in rows:
                if not row.start:
                    self.pool.clear_slot(row.slot)
            logits = self.runner.decode([row for _, row in rows])
            choice = self.sampler.choose(logits, [place for request, row in rows for place in places_of(request, row)])
            if len(choice.rows) == len(rows):  # else there are drafts, and the next step waits
                self.runner.keep([row for _, row in rows], choice.tokens)
            self._launched.append(Launched(rows, choice))
        except Exception as error:
            if not self._survives(error):
                self._fail([request for request, _ in rows], error)
                raise
            self._recover([(len(request.tokens), request) for request, _ in rows])
            return False
        return True

    def _prefill(self, step: Step) -> None:
        """Read pieces of prompts, and keep or copy what is then in memory."""
        for _, piece in step.pieces:
            if not piece.start:
                self.pool.clear_slot(piece.slot)
        hidden = self.runner.prefill([piece for _, piece in step.pieces]) if step.pieces else []
        if self._has_prefilled is not None and step.pieces:
            self._has_prefilled.record(torch.cuda.current_stream(self.model.device))
        for (request, piece), states in zip(step.pieces, hidden, strict=True):
            if states is not None:
                self._add_prompt_logprobs(request, piece, states)
        for request, n in step.snapshots:
            self.memory.snapshot(request, n)
        for request, fork in step.forks:
            n, page_size = len(fork.tokens) - 1, self.plan.page_size
            if n:
                self.pool.copy_slot(request.slot, fork.slot)
            if n % page_size:
                self.pool.copy_page(request.pages[n // page_size], fork.pages[n // page_size])
        for request in step.kept:
            self._end(request, "stop")

    def _add_prompt_logprobs(self, request: Request, piece: Piece, hidden: torch.Tensor) -> None:
        """Hidden states [P, d] of a piece, whose tokens each predict the next one."""
        known, count = request.output.prompt_logprobs, request.params.prompt_logprobs
        assert known is not None
        assert count is not None
        again = len(known) - 1 - piece.start  # of a request that is read a second time
        targets = request.tokens[len(known) : piece.start + len(piece.tokens) + 1]
        if targets:
            known += prompt_logprobs(hidden[again:], self.runner.head, targets, count, self.tokenizer)

    def _read(self, keep: int = 0) -> None:
        """Take the tokens of the rows that were launched, but for the last `keep` steps."""
        while len(self._launched) > keep:
            self._read_one(self._launched.popleft())

    def _read_one(self, launched: Launched) -> None:
        try:
            found = self.sampler.read(launched.choice)
        except Exception as error:
            requests = [request for request, _ in launched.rows if request not in launched.lost]
            if not self._survives(error):
                self._fail(requests, error)
                raise
            self._recover([(len(request.tokens), request) for request in requests])
            return
        now, first, num_tokens, num_accepted = self.clock(), 0, 0, 0
        for request, row in launched.rows:
            count = row.num_logits
            places, first = found[first : first + count], first + count
            if request in launched.lost:
                continue
            if request.state is State.FINISHED:  # by the token before, or from outside
                if places[0].is_broken:
                    self.memory.forget(request)  # a snapshot at its end has the token taken in that led to this
                continue
            request.num_unread -= 1
            if places[0].is_late and request.num_unread:  # the next row has read another token
                self._put_back(request)
            drafts = row.tokens[row.kept :] if count > 1 else ()
            for place, sampled in enumerate(places):
                if sampled.error is not None:
                    self._end(request, "error", error=sampled.error)
                    if sampled.is_broken:
                        self.memory.forget(request)
                    break
                reason, stop = append_token(request, sampled, now, self.eos_token_ids)
                self._changed[request] = None
                num_tokens += 1
                if reason == "error":
                    self._end(request, reason, error=str(stop))
                elif reason is not None:
                    self._end(request, reason, stop)
                if place == len(drafts) or sampled.token != drafts[place]:
                    break
                num_accepted += 1
                if reason is not None:
                    break
        self._counts["rows"] += len(launched.rows)
        self._counts["sampled_tokens"] += num_tokens
        self._counts["drafts_proposed"] += len(found) - len(launched.rows)
        self._counts["drafts_accepted"] += num_accepted

    def _tell(self) -> list[RequestOutput]:
        """The outputs that have changed, with their texts."""
        outputs: dict[str, RequestOutput] = {}
        for request in list(self._changed):
            reason, why = add_text(request)
            if reason == "error":
                self._end(request, reason, error=str(why))
                request.answer.finish_reason, request.answer.error = reason, str(why)  # if it had ended, too
            outputs[request.request_id] = request.output
        self._changed.clear()
        return list(outputs.values())

    def _propose(self, request: Request) -> list[int]:
        """Drafts of what may follow a request's tokens."""
        if not can_draft(request.params):
            return []
        if request.drafter is None:
            request.drafter = PromptLookup()
        assert self.options.speculative is not None
        left = request.max_tokens - request.num_output_tokens - 1
        return request.drafter.propose(request.tokens, min(self.options.speculative.get("num_tokens", 7), left))

    # -- endings --------------------------------------------------------------------------------------------------

    def _end(self, request: Request, reason: str, stop: int | str | None = None, error: str | None = None) -> None:
        """End an answer, and those that were to go on from the same prompt; its memory goes, or is kept for others."""
        if request.state is State.FINISHED:
            return
        if reason in ("stop", "length") and request.slot:
            self.memory.snapshot(request, request.n)  # the next turn goes on from there
        self.scheduler.finish(request)
        for one in (request, *request.forks):
            one.state = State.FINISHED
            one.answer.finish_reason, one.answer.stop_reason, one.answer.error = reason, stop, error
            one.drafter = one.grammar = one.chain = None
            self._changed[one] = None
        request.forks = []
        if all(answer.finished for answer in request.output.outputs):
            request.output.finished = True
            request.output.metrics.finished_time = self.clock()
            self._metrics.finish(request.output)
            del self._requests[request.request_id]

    def _survives(self, error: Exception) -> bool:
        """Whether the engine goes on after an error in a pass: memory ran out. What the pass held is free then."""
        if not is_out_of_memory(error):
            return False
        traceback.clear_frames(error.__traceback__)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _recover(self, sizes: list[tuple[int, Request]], others: Sequence[Request] = ()) -> None:
        """After memory has run out in a pass: the largest of its requests fails, the others are read again."""
        sizes = [pair for pair in sizes if pair[1].state is not State.FINISHED]  # aborted while the pass ran
        largest = max(sizes, key=lambda pair: pair[0])[1] if sizes else None
        for request in (*(request for _, request in sizes), *others):
            if request is not largest:
                self._put_back(request)
        if largest is not None:
            self._end(largest, "error", error="memory ran out while a step ran in which this request was the largest.")

    def _put_back(self, request: Request) -> None:
        """Let a request be read again, with the tokens that are known."""
        for launched in self._launched:
            launched.lost.add(request)
        self.scheduler.put_back(request)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """After an error that should not be: nothing in the memory of these requests can be trusted."""
        for request in requests:
            self._end(request, "error", error=f"{type(error).__name__}: {error}")

    # -- what it does ---------------------------------------------------------------------------------------------

    def metrics(self) -> MetricsReport:
        """What was counted and measured so far."""
        return self._metrics.report(
            Gauges(
                num_waiting=self.scheduler.num_waiting,
                num_running=len(self.scheduler.running),
                pages_used=self.pages.num_used,
                pages_total=self.pages.num_pages - 1,
                slots_used=self.slots.num_used,
                slots_total=self.slots.num_slots - 1,
                snapshots=self.cache.snapshots() if self.cache is not None else {},
                snapshot_bytes=self.cache.nbytes() if self.cache is not None else {},
            ),
            self.cache.counts if self.cache is not None else None,
        )

    def close(self) -> None:
        """End what runs, and give the memory back: it takes no more requests. Closing it again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for request_id in list(self._requests):
            self.abort_request(request_id)
        self._launched.clear()
        if self.cache is not None:
            self.cache.close()
        on_gpu = self.model.device.type == "cuda"
        with contextlib.suppress(RuntimeError):  # of a GPU that has failed: whoever waited was told
            if on_gpu:
                torch.cuda.synchronize(self.model.device)
            self.runner = None  # with its graphs
            self.pool.release()
            if on_gpu:
                torch.cuda.empty_cache()
