"""A small YOCO that finds needles in 32K tokens, from text to report: build, train in stages, measure.

    python recipes/needles/run.py TEXT OUT                                        all of it
    python recipes/needles/run.py TEXT OUT --seconds 60 20 20 50 90               stages that end in time
    python recipes/needles/run.py TEXT OUT --held-out REPOSITORY.jsonl            also the loss by position there

TEXT as for build.py, without what is measured on. Stopped, the same command goes on; it skips what is done.
OUT gets data/ (build.py), drill-2/ ... short/ and long/ (the stages; long/model is the result), eval/, report.html and
figures/.

Measured on one H100 (16 cores): 470 s, of which 178 s are training (23, 4, 11, 50 and 90 s; the drills end at their
target loss) and 86 s reading and answering; the rest goes into building the rows and starting the commands.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ONCELM = (sys.executable, "-m", "oncelm")
DRILL_TOKENS = 16384  # in a step


class Stage(NamedTuple):
    """A part of the training: its recipe, length of its rows, tokens to build, loss at which it ends early."""

    recipe: str
    length: int
    tokens: str
    target_loss: float | None = None


# Targets of drills. With two facts, who looks nothing up is at log 512 = 6.2, who knows all that can be known at 1.3; a
# model of width 128 that knows 98 tokens of 100 that follow from a key was at 1.9. With 8 and 32, all that can be known
# is 1.0 and 0.8; that model knew nine of ten at 2.9 and 3.3, before it made use of a row having 16 tokens only.
STAGES = {
    "drill-2": Stage("drill", 64, "16M", target_loss=2.0),
    "drill-8": Stage("drill", 256, "16M", target_loss=2.6),
    "drill-32": Stage("drill", 1024, "16M", target_loss=2.6),
    "short": Stage("short", 2048, "40M"),
    "long": Stage("long", 32768, "34M"),
}


@dataclass(frozen=True)
class Step:
    """A command, and what is there once it is done; None: it is run again, and knows itself what is left."""

    command: tuple[str, ...]
    makes: Path | None = None

    def do(self) -> None:
        """Run it, unless it is done; SystemExit where it fails or is stopped."""
        if self.makes is not None and self.makes.exists():
            return
        print("$", " ".join(self.command), flush=True)
        stopped = False
        with subprocess.Popen(self.command) as process:

            def stop(number: int, frame: object) -> None:
                """Let the command save what it has, and wait for it; Ctrl-C reaches it by itself."""
                nonlocal stopped
                stopped = True
                if number == signal.SIGTERM:
                    process.terminate()

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
            status = process.wait()
        if status:
            raise SystemExit(status)
        if stopped or (self.makes is not None and not self.makes.exists()):
            raise SystemExit("stopped; the same command goes on.")


def steps(args: argparse.Namespace) -> list[Step]:
    """All commands, in order."""
    data, results, model = args.out / "data", args.out / "eval", args.out / "long" / "model"
    amounts = [f"{length}:{tokens}" for length, tokens in zip(args.rows, args.tokens, strict=True)]
    drills = sum(stage.recipe == "drill" for stage in STAGES.values())  # the first ones
    build = [sys.executable, HERE / "build.py", args.text, data, "--drill", *amounts[:drills]]
    build += ["--tokens", *amounts[drills:], *shlex.split(args.build)]
    found = [Step(_words(build), data / str(args.rows[-1]) / "tokens.json")]

    start: list[object] = []
    limits = args.seconds or [None] * len(STAGES)
    for (name, stage), length, seconds in zip(STAGES.items(), args.rows, limits, strict=True):
        rows, out = data / str(length), args.out / name
        settings = [f"seq_len={length}", f"model_overrides.max_position_embeddings={length}"]
        if stage.recipe == "drill":
            rows = data / f"drill-{length}"
            settings += [f"batch_size={max(1, DRILL_TOKENS // length)}", f"target_loss={stage.target_loss}"]
        if seconds is not None:
            settings += [f"max_seconds={seconds}", "steps=null"]
        train = [*ONCELM, "train", rows, "--out", out, *start, "--resume", "--config", HERE / f"{stage.recipe}.yaml"]
        found.append(Step(_words([*train, "--set", *settings, *args.set]), out / "finished"))
        start = ["--model", out / "model"]

    longest = args.rows[-1]
    measured = [args.shortest << i for i in range((4 * longest // args.shortest).bit_length())]
    strict = ["--strict", "--max-new-tokens", 10]  # numbers have up to 5 digits
    beyond = ["--beyond-trained-length"]
    asked = {
        "needle": ["needle", model, *strict, *beyond, "--lengths", _list(measured)],
        "multi-needle": ["multi-needle", model, *strict, "--lengths", longest],
        "nll-moby-dick": ["nll", model, *beyond, "--max-tokens", 4 * longest],
    }
    if args.held_out is not None:
        asked["nll-held-out"] = ["nll", model, *beyond, "--max-tokens", 4 * longest, "--documents", args.held_out]
    for name, task in asked.items():
        extra = shlex.split(args.eval) if "needle" in name else []
        found.append(Step(_words([*ONCELM, "eval", *task, *extra, "--out", results / f"{name}.jsonl"])))
    files = [results / f"{name}.jsonl" for name in asked]
    report = ["report", *files, "--out", args.out / "report.html", "--png", args.out / "figures"]
    found.append(Step(_words([*ONCELM, "eval", *report, "--title", "Needles"])))
    return found


def _words(command: list[object]) -> tuple[str, ...]:
    return tuple(str(word) for word in command)


def _list(values: Iterable[object], between: str = ",") -> str:
    return between.join(map(str, values))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT", help="a file or folder of text")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for everything")
    count = len(STAGES)
    lengths, tokens = [stage.length for stage in STAGES.values()], [stage.tokens for stage in STAGES.values()]
    parser.add_argument("--seconds", nargs=count, type=float, metavar="S", help="most time of each stage (no limit)")
    parser.add_argument("--held-out", metavar="TEXT", help="one more text for the loss by position, as a repository's")
    parser.add_argument(
        "--rows", nargs=count, type=int, default=lengths, metavar="T", help=f"their lengths ({_list(lengths, ' ')})"
    )
    parser.add_argument("--tokens", nargs=count, default=tokens, metavar="N", help=f"to build ({_list(tokens, ' ')})")
    parser.add_argument("--shortest", type=int, default=1024, metavar="T", help="length that is measured (1024)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replace settings of all stages")
    parser.add_argument("--build", default="", metavar="'OPTIONS'", help="further options of build.py, quoted")
    parser.add_argument("--eval", default="", metavar="'OPTIONS'", help="further options of the needle tasks, quoted")
    args = parser.parse_args(arguments)
    for step in steps(args):
        step.do()


if __name__ == "__main__":
    main()
