"""`oncelm run`: another tool's command in a process that knows OnceLM's models."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from typing import Any

DESCRIPTION = """\
usage: oncelm run TOOL [ARGUMENTS ...]

Run the command of another Python package so that it knows OnceLM's models. Tools built on transformers (AutoModel,
AutoConfig) load YOCO and LongLLaMA folders once oncelm is imported, which they do not do by themselves. No code from a
model's folder is run for that: --trust-remote-code is not needed. Processes that the tool itself starts do not know
the models.

examples:
  oncelm run lm_eval --model hf --model_args pretrained=runs/books/model --tasks arc_easy
      lm-eval with transformers' own forward pass
  oncelm run transformers serve
      transformers' server, for YOCO and LongLLaMA folders too
  lm_eval --model oncelm --model_args pretrained=runs/books/model --tasks arc_easy
      needs no `oncelm run`: lm-eval finds OnceLM's own, faster scorer by itself
"""


def main(arguments: list[str]) -> int:
    """Run the tool that the first argument names; all others are its own."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(DESCRIPTION, end="")
        raise SystemExit(0)
    name, *rest = arguments
    command = find_command(name)
    importlib.import_module("oncelm.models")  # which registers them with transformers
    if name.replace("-", "_") == "lm_eval":
        importlib.import_module("lm_eval")
        importlib.import_module("oncelm_lm_eval").autoload()
    sys.argv = [name, *rest]
    return command() or 0


def find_command(name: str) -> Callable[[], Any]:
    """What the command of that name calls; ValueError with the nearest name where no installed package has it."""
    from importlib.metadata import entry_points

    scripts = {script.name: script for script in entry_points(group="console_scripts")}
    if name not in scripts:
        near = difflib.get_close_matches(name, scripts, n=1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no installed Python package has a command {name!r};{hint} `oncelm run TOOL` runs one.")
    return scripts[name].load()
