"""Replaying on an engine: times are honoured, turns build on each other, failures are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oncelm.bench.serve.figures import figures, serve_table
from oncelm.bench.serve.in_process import replay
from oncelm.bench.serve.play import Answer
from oncelm.bench.serve.plot import check_plot, plot_replay
from oncelm.bench.serve.workload import Conversation, Turn
from tests.bench.serve.stand_in import StandIn


def run(engine: StandIn, *conversations: Conversation, seed: int = 0) -> list[Answer]:
    return replay(engine, conversations, vocab_size=50, seed=seed, clock=engine.clock, sleep=engine.sleep)


def test_arrivals_are_honoured() -> None:
    engine = StandIn(most=2)
    first = Conversation((Turn(5, 2),), priority=3)
    meanwhile = Conversation((Turn(6, 3),), arrival=0.25)
    third = Conversation((Turn(7, 1),), arrival=1.5)
    later = Conversation((Turn(8, 1),), arrival=9.5)
    answers = run(engine, later, first, third, meanwhile)
    assert [answer.conversation for answer in answers] == [0, 1, 2, 3]
    assert engine.priorities["1.0"] == 3
    times = [answer.times for answer in answers]
    assert [one.arrival_time - 100 for one in times] == [9.5, 0.0, 1.5, 0.25]  # not when the step was over
    assert [one.first_token_time - 100 for one in times] == [10.5, 1.0, 3.0, 2.0]
    assert [one.finished_time - 100 for one in times] == [10.5, 2.0, 3.0, 4.0]
    assert engine.slept == [5.5]
    assert [(answer.num_prompt_tokens, answer.num_output_tokens) for answer in answers] == [
        (8, 1), (5, 2), (7, 1), (6, 3),
    ]  # fmt: skip


def test_turns_build_on_each_other() -> None:
    engine = StandIn()
    answers = run(engine, Conversation((Turn(4, 2), Turn(3, 2, think=10), Turn(1, 1)), arrival=1.0))
    assert [answer.times.arrival_time - 100 for answer in answers] == [1.0, 13.0, 15.0]
    one, two, three = (engine.prompts[f"0.{turn}"] for turn in range(3))
    assert (len(one), len(two), len(three)) == (4, 4 + 2 + 3, 9 + 2 + 1)
    assert two[:6] == [*one, 7, 7]
    assert three[:11] == [*two, 7, 7]
    text = Conversation((Turn("Once", 2), Turn("more", 1)))
    run(engine, text)
    assert engine.prompts["0.1"] == "Onceseven seven more"


def test_prompts_share_what_the_workload_says() -> None:
    engine = StandIn(most=9)
    shared = [
        Conversation((Turn(5, 1),), prefix=name, prefix_length=length)
        for name, length in (("a", 20), ("a", 30), ("b", 20))
    ]
    run(engine, *shared)
    one, two, other = (engine.prompts[f"{i}.0"] for i in range(3))
    assert (len(one), len(two)) == (25, 35)
    assert one[:20] == two[:20]
    assert one[20:] != two[20:25]
    assert one[:20] != other[:20]
    again = StandIn(most=9)
    run(again, *shared)
    assert again.prompts == engine.prompts
    run(again, *shared, seed=1)
    assert again.prompts != engine.prompts
    assert all(3 <= token < 50 for token in one)


def test_a_failure_ends_its_conversation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StandIn(longest=100)
    monkeypatch.setattr(
        "oncelm.bench.serve.play.Player._made_up",
        lambda self, name, length: [666] * length if length == 9 else [1] * length,
    )
    answers = run(
        engine,
        Conversation((Turn(101, 1), Turn(1, 1))),
        Conversation((Turn(9, 1), Turn(1, 1))),
        Conversation((Turn(8, 1), Turn(1, 1))),
    )
    assert [(answer.conversation, answer.turn) for answer in answers] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert [answer.error for answer in answers] == [
        "101 tokens can never fit; 100 would.", "logits are not finite", None, None,
    ]  # fmt: skip
    found = figures(answers)
    assert (found["requests"], found["failed"]) == (4, 2)
    assert found["errors"]["logits are not finite"] == 1


def test_figures_a_table_and_a_plot(tmp_path: Path) -> None:
    engine = StandIn(most=2)
    answers = run(engine, *[Conversation((Turn(10, 4),))] * 4)
    found = figures(answers)
    json.dumps(found, allow_nan=False)
    assert found["seconds"] == 8.0
    assert (found["prompt_tokens"], found["output_tokens"], found["cached_tokens"]) == (40, 16, 4)
    assert (found["output_tokens_per_second"], found["total_tokens_per_second"]) == (2.0, 7.0)
    assert found["hit_rate"] == 0.1
    assert found["inter_token_latency"]["p99"] == found["tpot"]["p50"] == 1.0
    assert found["queue_time"]["max"] == 4.0
    drawn = serve_table({**found, "subject": "engine", "model": "m", "workload": "w", "memory": "pages"})
    assert "2 output tokens/s" in str(drawn.caption)
    assert drawn.row_count == 5
    failed = [Answer(0, 0, answers[0].times, error="HTTP 500")]
    nothing = figures(failed)
    assert nothing["ttft"] is None
    assert "1 x HTTP 500" in str(serve_table({**nothing, "subject": "u", "model": "m", "workload": "w"}).caption)
    with pytest.raises(ValueError, match="did you mean 'png'"):
        check_plot("a.pngg")
    pytest.importorskip("matplotlib")
    plot_replay(answers, tmp_path / "a.png", "a title")
    plot_replay(failed, tmp_path / "a.svg", "nothing to draw")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "a.svg").read_text()
