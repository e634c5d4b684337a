"""The `oncelm` command: one file per verb, each imported only when it is called.

A verb's module has `DESCRIPTION` (what it teaches on --help, with examples), `add_arguments(parser)` and `run(args)`;
or, where options follow from the arguments, as eval's from the task, `command(arguments)`, which gives these three.
A user's mistake (ValueError, OSError), a missing optional package (ImportError) or too little memory is one line and
exit status 2; with ONCELM_TRACEBACK=1 in the environment, behind the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from oncelm.utils.errors import is_out_of_memory, renamed, unknown

VERBS = {
    "demo": "train a small YOCO and a Transformer, read a long book, compare them",
    "data": "tokenize text for training, describe it, look at samples",
    "train": "train a model on text: a file, a folder or a corpus of weighted sources",
    "generate": "continue a prompt, of any length, with a trained model",
    "cache": "read documents once, keep them on disk, ask about them in milliseconds",
    "info": "describe a model, a preset, or this installation",
    "convert": "convert official YOCO folders and GGUF files to Hugging Face folders, and back",
    "eval": "evaluate a model: needles, loss by position, in-context learning; write a report",
    "run": "run another tool, such as lm_eval or transformers, so that it knows OnceLM's models",
    "bench": "measure prefill, decode, memory and training beside a Llama of the same shape; serving",
}

OLD_OPTIONS = {"--gemm": "--quantization", "--validation-share": "--validation-fraction"}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ValueError of one line, with the nearest option there is.

    An option's value may begin with a dash, unless it is the name of an option: `--prompt "--- 1 ---"`, `--seed -1`.
    """

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        return self.parse_args(list(self._joined(arguments)))

    def error(self, message: str) -> NoReturn:
        hint = "; a value that is the name of an option is given as --option=VALUE" if "expected one" in message else ""
        raise ValueError(f"{message}{hint} (see {self.prog} --help)")

    def option(self, argument: str) -> argparse.Action | None:
        """The option that an argument names, with or without "=VALUE", also by a beginning of its name; else None."""
        known, name = self._option_string_actions, argument.partition("=")[0]
        if name in known or not name.startswith("--") or len(name) == 2:
            return known.get(name)
        return next((action for option, action in known.items() if option.startswith(name)), None)

    def _joined(self, arguments: list[str]) -> Iterator[str]:
        """The arguments as argparse takes them for what they are: `--option=VALUE` where a value begins with a dash.

        `--set a=1 b=2 book.txt` becomes `--set=a=1 --set=b=2 book.txt`: what is no setting belongs to no --set.
        """
        left = list(reversed(arguments))
        while left:
            argument = left.pop()
            action = self.option(argument)
            if argument == "--":
                yield from (argument, *reversed(left))
                return
            if action is None:
                if argument.startswith("--") and " " not in argument:
                    if (name := argument.partition("=")[0]) in OLD_OPTIONS:
                        raise renamed("option", name, OLD_OPTIONS[name])
                    raise unknown(f"option of {self.prog}", argument.partition("=")[0], self._option_string_actions)
                yield argument
            elif argument.partition("=")[2] == "--" and action.nargs is None:  # argparse drops it
                self.error(f"argument {argument.partition('=')[0]}: -- is no value")
            elif "=" in argument or not left or left[-1] == "--" or self.option(left[-1]) is not None:
                yield argument
            elif action.metavar == "KEY=VALUE":
                yield f"{argument}={left.pop()}"
                while left and "=" in left[-1] and not left[-1].startswith("-"):
                    yield f"{argument}={left.pop()}"
            elif action.nargs is None and left[-1].startswith("-"):
                yield f"{argument}={left.pop()}"
            else:
                yield argument


class Command(NamedTuple):
    """A verb, or what one is with certain arguments."""

    description: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int | None]


def find_command(module: Any, arguments: list[str]) -> Command:
    """What a verb's module is with these arguments."""
    if hasattr(module, "command"):
        return module.command(arguments)
    return Command(module.DESCRIPTION, module.add_arguments, module.run)


def _print_any_text() -> None:
    """What standard output's encoding lacks is printed as an escape: a report of an hour's work never ends midway."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _top_level_parser() -> Parser:
    lines = "\n".join(f"  {verb:<10} {summary}" for verb, summary in VERBS.items())
    return Parser(
        prog="oncelm",
        description="Language models that cache keys and values once: train, run and measure them.",
        epilog=f"verbs:\n{lines}\n\n`oncelm VERB --help` explains each, with examples.\n"
        "An error is one line; with ONCELM_TRACEBACK=1 in the environment its traceback comes first.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 2 a user's mistake, 130 interrupted)."""
    _print_any_text()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not (isinstance(error, ValueError | OSError | ImportError) or is_out_of_memory(error)):
            raise
        if os.environ.get("ONCELM_TRACEBACK", "0") != "0":
            traceback.print_exc()
        rank = int(os.environ.get("RANK", "0"))  # of a process that torchrun started; the first speaks for all
        message = " ".join(str(error).splitlines())  # a word of the command line may have several
        print(f"oncelm: error{f' (rank {rank})' if rank else ''}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("oncelm: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    parser = _top_level_parser()
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("verb", nargs="?", metavar="VERB")
    known = parser.parse(arguments[:1])
    if known.version:
        from oncelm import __version__

        print(__version__)
        return 0
    if known.verb is None:
        parser.print_help()
        return 0
    if known.verb not in VERBS:
        raise unknown("verb", known.verb, VERBS)
    module = importlib.import_module(f"oncelm.cli.{known.verb}")
    if hasattr(module, "main"):  # the arguments are another program's
        return module.main(arguments[1:])
    command = find_command(module, arguments[1:])
    verb_parser = Parser(
        prog=f"oncelm {known.verb}",
        description=command.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(verb_parser)
    return command.run(verb_parser.parse(arguments[1:])) or 0
