"""Replaying a workload on an engine in this process."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from oncelm.bench.serve.play import Answer, Player, Progress
from oncelm.bench.serve.workload import Conversation
from oncelm.engine.metrics import ANSWERED
from oncelm.engine.outputs import RequestMetrics, RequestOutput
from oncelm.engine.params import SamplingParams


class Engine(Protocol):
    """What is needed of `oncelm.engine.engine.Engine`."""

    def add_request(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival_time: float | None = None,
    ) -> Any: ...

    def step(self) -> list[RequestOutput]: ...


def replay(
    engine: Engine,
    conversations: Sequence[Conversation],
    *,
    vocab_size: int,
    seed: int = 0,
    ignore_eos: bool = True,
    name: str = "requests",
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Answer]:
    """Replay on an engine, greedily: one answer a turn, in the order of conversations.

    A request counts from the moment at which it was due, even where a step of the engine was under way then. Where a
    turn fails, its conversation ends.

    Args:
        vocab_size: ids of made-up texts are below it.
        ignore_eos: answers are as long as the workload says.
        name: of the progress bar.
        clock, sleep: the engine's own clock, in seconds.
    """
    with Progress(conversations, name) as progress:
        return _Replay(engine, ignore_eos, clock, sleep, progress).run(
            [Player(number, one, vocab_size, seed) for number, one in enumerate(conversations)]
        )


@dataclass(order=True)
class _Due:
    """A turn that comes at a time; those of one time in the order in which they became known."""

    time: float
    order: int
    player: Player = field(compare=False)


class _Replay:
    def __init__(
        self,
        engine: Engine,
        ignore_eos: bool,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        progress: Progress,
    ) -> None:
        self.engine, self.ignore_eos, self.clock, self.sleep, self.progress = engine, ignore_eos, clock, sleep, progress
        self.order = itertools.count()
        self.due: list[_Due] = []
        self.running: dict[str, Player] = {}
        self.answers: list[Answer] = []

    def run(self, players: Sequence[Player]) -> list[Answer]:
        start = self.clock()
        for player in players:
            self.plan(player, start + player.conversation.arrival)
        while self.due or self.running:
            while self.due and self.due[0].time <= self.clock():
                self.add(heapq.heappop(self.due))
            if self.running:
                for output in self.engine.step():
                    if output.finished:
                        self.finish(output)
            elif self.due:
                self.sleep(max(0.0, self.due[0].time - self.clock()))
        return sorted(self.answers, key=lambda answer: (answer.conversation, answer.turn))

    def plan(self, player: Player, seconds: float) -> None:
        heapq.heappush(self.due, _Due(seconds, next(self.order), player))

    def add(self, due: _Due) -> None:
        player, prompt = due.player, due.player.prompt()
        turn = player.conversation.turns[player.turn]
        params = SamplingParams(
            max_tokens=turn.output,
            temperature=0.0,
            ignore_eos=self.ignore_eos,
            detokenize=player.conversation.is_text,
        )
        request_id = f"{player.number}.{player.turn}"
        try:
            self.engine.add_request(
                request_id, prompt, params, priority=player.conversation.priority, arrival_time=due.time
            )
        except ValueError as error:  # it can never fit
            self.done(player, Answer(player.number, player.turn, RequestMetrics(due.time), error=str(error)))
        else:
            self.running[request_id] = player

    def finish(self, output: RequestOutput) -> None:
        player, said = self.running.pop(output.request_id), output.outputs[0]
        answer = Answer(
            player.number,
            player.turn,
            output.metrics,
            len(output.prompt_token_ids),
            len(said.token_ids),
            output.num_cached_tokens,
            None if said.finish_reason in ANSWERED else said.error or said.finish_reason,
        )
        self.done(player, answer)
        if answer.error is None:
            player.answered(said.text, said.token_ids, len(said.token_ids))
            if (turn := player.next_turn()) is not None:
                self.plan(player, (output.metrics.finished_time or self.clock()) + turn.think)

    def done(self, player: Player, answer: Answer) -> None:
        self.answers.append(answer)
        self.progress.add(answer, player.turns_left if answer.error else 1)
