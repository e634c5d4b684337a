"""`oncelm eval`: tasks that say how good a model is, and at what length; and reports of their results."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

from oncelm.cli.options import add_options, find_tokenizer, model_keys, session_options
from oncelm.cli.output import print_tables
from oncelm.utils.files import check_place

if TYPE_CHECKING:
    from oncelm.cli import Command
    from oncelm.eval import LanguageModel, Run, Table, Task

DESCRIPTION = """\
Ask a model the questions of a task and judge its answers. No other model judges, and nothing is fetched, but for the
questions of lm-eval's tasks (yoco-table, longllama-table, harness) where --data names no folder of them.

{tasks}
  report          one HTML page of any number of runs, beside the papers' figures

MODEL is a folder or hub id of any model that `oncelm generate` takes: YOCO (also the official code's folders) and, to
compare, every causal language model of transformers; or a preset, with random weights, to try things out.

Every sample is a line of the result file, on disk before the next one is asked (of lm-eval's tasks: the next 128). A
run that was stopped or killed goes on when the same command is given again; a file of another configuration is refused.
The same seed asks the same.

examples:
  oncelm eval needle runs/books/model --lengths 4K,16K,64K --strict
      hide a number in a long text, 11 depths x 10 runs a length; each text is read once for all depths
  oncelm eval nll runs/books/model --documents book.txt
      loss by position of a document of any length
  oncelm eval yoco-table runs/books/model --data data/harness --limit 100
      the paper's table: 100 questions of each of eight tasks, from a folder (recipes/eval_data.py builds it)
  oncelm eval ruler runs/books/model --lengths 4K,16K --data data/ruler --samples 50
      RULER's thirteen tasks; six of them need no --data
  oncelm eval report runs/eval/*.jsonl --out report.html
      tables, heatmaps and curves of several models and tasks, in one page
  oncelm eval needle --help
      the options of a task
  oncelm eval my_task.py runs/books/model
      a task of your own: docs/evaluation.md shows how to write one
"""


def command(arguments: list[str]) -> Command:
    """What `oncelm eval ...` stands for: a task, the report, or, with neither, an overview."""
    from oncelm.cli import Command
    from oncelm.eval import TASKS, find_task

    named = _first_positional(arguments)
    if named == "report":
        return Command(REPORT, add_report_arguments, run_report)
    if named is None:
        lines = "\n".join(f"  {name:<15} {task.summary}" for name, task in TASKS.items())
        return Command(DESCRIPTION.format(tasks=lines), add_run_arguments, refuse_task)
    task = find_task(named) if named.endswith(".py") else _known(named)
    description = " ".join((task.__doc__ or "").split())
    return Command(
        f"{task.name}: {task.summary}\n\n{description}",
        partial(add_run_arguments, task=task),
        partial(run_task, task),
    )


def refuse_task(args: argparse.Namespace) -> None:
    """What argparse takes for a task and `_first_positional` does not, such as "-" and "-1"."""
    _known(args.task)


def add_run_arguments(parser: argparse.ArgumentParser, task: type[Task] | None = None) -> None:
    """Those of a run of a task; without one, those that all tasks have."""
    parser.add_argument("task", metavar="TASK", help="see above, or a Python file" if task is None else "")
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face or official YOCO folder, hub id, or preset")
    if task is not None:
        add_task_options(parser, task)
    add_run_options(parser)


def _first_positional(arguments: list[str]) -> str | None:
    """The first argument that is neither an option nor the value of one, of any task's options."""
    from oncelm.cli import Parser
    from oncelm.eval import TASKS

    parser = Parser(add_help=False, conflict_handler="resolve")
    for task in TASKS.values():
        add_task_options(parser, task)
    add_run_options(parser)
    add_report_options(parser)
    left = list(reversed(arguments))
    while left:
        argument = left.pop()
        if argument == "--":
            return left.pop() if left else None
        if not argument.startswith("-"):
            return argument
        option = parser.option(argument)
        takes_value = option is None or option.nargs is None  # an option of a task in a file may be any
        if takes_value and "=" not in argument and left and not left[-1].endswith(".py"):
            left.pop()
    return None


def _known(name: str) -> type[Task]:
    from oncelm.eval import TASKS
    from oncelm.utils.errors import check_choice

    check_choice("task", name, (*TASKS, "report"))
    return TASKS[name]


# -- a task -----------------------------------------------------------------------------------------------------------


def add_task_options(parser: argparse.ArgumentParser, task: type[Task]) -> None:
    """An option for every field of the task."""
    group = parser.add_argument_group(f"options of {task.name}")
    for name, kind, default, help in task.option_fields():
        flag = f"--{name.replace('_', '-')}"
        shown = "" if default in (None, "", False) else f" ({_show(default)})"
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
        else:
            parse, metavar = _parser_of(kind)
            group.add_argument(flag, type=parse, default=default, metavar=metavar, help=help + shown)


def _parser_of(kind: Any) -> tuple[Any, str]:
    """How an option's text is read, and how its value is shown in the help."""
    from oncelm.eval.task import parse_tokens

    if isinstance(kind, UnionType):  # int | None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_args(kind):  # tuple[int, ...]
        return _told(lambda text: tuple(parse_tokens(part) for part in text.split(","))), "N,N"
    if kind is int:
        return _told(parse_tokens), "N"
    return kind, {float: "X", str: "TEXT"}.get(kind, "VALUE")


def _told(parse: Any) -> Any:
    """`parse`, with its error as argparse likes it."""

    def call(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return call


def _show(value: Any) -> str:
    from oncelm.eval.views import tokens

    return ",".join(map(tokens, value)) if isinstance(value, tuple) else str(value)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--out", metavar="FILE", help="the result file (runs/eval/TASK-NAME.jsonl; runs/x/model is named x)"
    )
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random in the task (0)")
    run.add_argument("--limit", type=int, metavar="N", help="stop after N samples; without it, the run goes on later")
    run.add_argument(
        "--beyond-trained-length", action="store_true", help="allow texts longer than the model was made for"
    )
    add_options(run, "tokenizer", "mem_layers", "memory", "last_context_length", "device", "dtype")
    run.add_argument("--compile", action="store_true", help="use torch.compile: worth its half minute on long texts")


def run_task(task_type: type[Task], args: argparse.Namespace) -> int:
    from oncelm.eval import make_task, run
    from oncelm.models.load import quiet_transformers
    from oncelm.utils.constraints import Whole, check_options

    check_options(args, {"seed": Whole(0), **dict.fromkeys(("limit", "last_context_length"), Whole(1))})
    options = {name: getattr(args, name) for name, *_ in task_type.option_fields()}
    task = make_task(task_type, **options)  # what is wrong with the options shows before a model is loaded
    out = Path(args.out or f"runs/eval/{task.name}-{_model_name(args.model)}.jsonl")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file.")
    check_place(out, "--out")
    model = load_model(args)
    with quiet_transformers():
        done = run(task, model, out, seed=args.seed, limit=args.limit, beyond_trained_length=args.beyond_trained_length)
    print_views(task_type, done)
    samples = done.samples.values()
    if "tokens_read" in next(iter(samples), {}):
        read, seconds, answer = (
            sum(s.get(n, 0) for s in samples) for n in ("tokens_read", "read_seconds", "answer_seconds")
        )
        print(f"read {read:,} tokens in {seconds:,.1f} s, answered in {answer:,.1f} s", file=sys.stderr)
    print(f"{len(samples):,} samples in {out}; oncelm eval report {out} --out report.html shows them", file=sys.stderr)
    return 0


def load_model(args: argparse.Namespace) -> LanguageModel:
    """The model and its tokenizer."""
    from oncelm.eval import LanguageModel
    from oncelm.models.resolve import build, describe, is_preset

    keys = model_keys(args)
    config = describe(args.model, **keys)
    options = session_options(config, args)
    tokenizer = find_tokenizer(args.model, args.tokenizer)
    if is_preset(args.model):
        print(f"oncelm: warning: {args.model} is a preset: its weights are random.", file=sys.stderr)
        config = describe(args.model, vocab_size=len(tokenizer), **keys)
    model = build(args.model, args.device, args.dtype, compile=args.compile, config=config, **keys)
    return LanguageModel(model, tokenizer, _model_name(args.model), **options)


def _model_name(model: str) -> str:
    """The last part of a path or hub id; the run's, for the folder `model` that `oncelm train` makes in it.

    >>> _model_name("runs/books/model"), _model_name("HuggingFaceTB/SmolLM2-135M")
    ('books', 'SmolLM2-135M')
    """
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def print_views(task: type[Task], done: Run) -> None:
    """The tables of a run."""
    from oncelm.eval import Table
    from oncelm.eval.task import checked_views

    for view in checked_views(task, [done]) if done.samples else ():
        if isinstance(view, Table):
            print_tables(_rich(view))


def _rich(view: Table) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text  # a name such as a[/b] is no markup

    drawn = RichTable(caption_justify="left")
    drawn.title, drawn.caption = Text(view.title, "table.title"), Text(view.note, "table.caption")
    for i, name in enumerate(view.header):
        drawn.add_column(Text(name), justify="left" if i == 0 else "right")
    for row in view.rows:
        drawn.add_row(*map(Text, row))
    drawn.add_section()
    for row in view.quoted:
        drawn.add_row(*map(Text, row), style="dim italic")
    return drawn


# -- reports ----------------------------------------------------------------------------------------------------------

REPORT = """\
One HTML page of result files: tables beside the papers' rows, heatmaps whose cells show their samples, curves. It
needs nothing else, not even a network. Runs of one task on several models stand side by side; unfinished ones say so.

examples:
  oncelm eval report runs/eval/*.jsonl --out report.html
  oncelm eval report runs/eval/needle-mine.jsonl --out report.html --png figures
"""


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="")
    parser.add_argument("runs", nargs="+", metavar="FILE", help="result files")
    add_report_options(parser)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (report.html)")
    parser.add_argument("--title", default="Evaluation", help="the page's title (Evaluation)")
    parser.add_argument("--png", metavar="DIR", help="also write heatmaps and curves as PNG files into this folder")


def run_report(args: argparse.Namespace) -> int:
    from oncelm.eval import read_run, write_report
    from oncelm.eval.page import sections_of
    from oncelm.eval.plot import check_plotting, write_pngs

    if args.png:  # before anything is written
        check_plotting()
    for place, option in ((args.out, "--out"), (args.png, "--png")):
        if place:
            check_place(place, option)
    if args.png and Path(args.png).exists() and not Path(args.png).is_dir():
        raise ValueError(f"--png {args.png} is a file; name a folder.")
    runs = write_report([read_run(path) for path in args.runs], args.out, args.title)
    print(f"{args.out}: {len(runs)} runs")
    if args.png:
        for name, views in sections_of(runs):
            for path in write_pngs(views, args.png, name):
                print(path)
    return 0
