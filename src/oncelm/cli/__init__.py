"""The `oncelm` command: one file per verb, each imported only when it is called.

A verb's module has `DESCRIPTION` (what it teaches on --help, with examples), `add_arguments(parser)` and `run(args)`.
A user's mistake (ValueError, OSError) or a missing optional package (ImportError) is one line and exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

from oncelm.utils.errors import unknown

VERBS = {
    "demo": "train a small YOCO and a Transformer, read a long book, compare them",
    "data": "tokenize text for training, describe it, look at samples",
    "train": "train a model on text: a file, a folder or a corpus of weighted sources",
    "generate": "continue a prompt, of any length, with a trained model",
    "info": "describe a model, a preset, or this installation",
    "convert": "convert official YOCO folders and GGUF files to Hugging Face folders, and back",
    "eval": "evaluate a model: needles, loss by position, in-context learning; write a report",
    "bench": "measure prefill, decode, memory and training beside a Llama of the same shape",
}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ValueError of one line, with the nearest option there is."""

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        known = self._option_string_actions
        for name in (argument.partition("=")[0] for argument in arguments):
            if name.startswith("--") and len(name) > 2 and not any(option.startswith(name) for option in known):
                raise unknown(f"option of {self.prog}", name, known)
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _top_level_parser() -> Parser:
    lines = "\n".join(f"  {verb:<10} {summary}" for verb, summary in VERBS.items())
    return Parser(
        prog="oncelm",
        description="Language models that cache keys and values once: train, run and measure them.",
        epilog=f"verbs:\n{lines}\n\n`oncelm VERB --help` explains each, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 2 a user's mistake, 130 interrupted)."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
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
        from importlib.metadata import version

        print(version("oncelm"))
        return 0
    if known.verb is None:
        parser.print_help()
        return 0
    if known.verb not in VERBS:
        raise unknown("verb", known.verb, VERBS)
    module = importlib.import_module(f"oncelm.cli.{known.verb}")
    if hasattr(module, "part"):  # a verb of several parts with options of their own, such as eval's tasks
        module = module.part(arguments[1:])
    verb_parser = Parser(
        prog=f"oncelm {known.verb}",
        description=module.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(verb_parser)
    return module.run(verb_parser.parse(arguments[1:])) or 0
