"""An engine that writes 7s: a second a step on a clock of its own, prompts read at once, a few requests at a time."""

from __future__ import annotations

from oncelm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput


class StandIn:
    def __init__(self, most: int = 2, longest: int = 1000) -> None:
        self.most, self.longest = most, longest
        self.now = 100.0
        self.waiting: list[tuple] = []
        self.running: list[tuple] = []
        self.prompts: dict[str, list[int] | str] = {}
        self.priorities: dict[str, int] = {}
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def add_request(self, request_id, prompt, params, *, priority=0, arrival_time=None) -> None:
        if len(prompt) > self.longest:
            raise ValueError(f"{len(prompt)} tokens can never fit; {self.longest} would.")
        self.prompts[request_id], self.priorities[request_id] = prompt, priority
        ids = [] if isinstance(prompt, str) else prompt
        answer = CompletionOutput(0, logprobs=None)
        output = RequestOutput(
            request_id, None, ids, [answer], False, RequestMetrics(arrival_time), num_cached_tokens=1
        )
        self.waiting.append((output, params))

    def step(self) -> list[RequestOutput]:
        while self.waiting and len(self.running) < self.most:
            self.running.append(self.waiting.pop(0))
            self.running[-1][0].metrics.first_scheduled_time = self.now
        self.now += 1.0
        for output, params in self.running:
            answer, times = output.outputs[0], output.metrics
            answer.token_ids.append(7)
            answer.text += "seven "
            times.token_times.append(self.now)
            times.first_token_time = times.token_times[0]
            if len(answer.token_ids) == params.max_tokens:
                output.finished, answer.finish_reason, times.finished_time = True, "length", self.now
                if 666 in output.prompt_token_ids:
                    answer.finish_reason, answer.error = "error", "logits are not finite"
        changed = [output for output, _ in self.running]
        self.running = [one for one in self.running if not one[0].finished]
        return changed
