"""What `import oncelm` and the command's help change in a process, and what they import."""

from __future__ import annotations

import json
import subprocess
import sys

import oncelm
import oncelm.engine
import oncelm.eval
from oncelm.cli import VERBS

CODE = """
import json, logging, os, random, sys, warnings
import numpy, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

def state():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "warnings": [str(filter) for filter in warnings.filters],
        "logging": [(name, logging.getLogger(name).level, len(logging.getLogger(name).handlers)) for name in loggers],
        "environment": sorted(os.environ.items()),
        "torch": [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
                  matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, torch._dynamo.config.recompile_limit],
        "random": [torch.initial_seed(), random.getstate()[1][:4], numpy.random.get_state()[1][:4].tolist()],
    }

loggers = [None, *sorted(logging.root.manager.loggerDict)]
before, modules = state(), set(sys.modules)
import oncelm
after = state()
AutoModelForCausalLM._model_mapping[AutoConfig.for_model("oncelm_yoco").__class__]  # a KeyError if it is not known
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "imported": sorted(set(sys.modules) - modules),
}))
"""
MOST_MODULES = 120  # that `import oncelm` adds to those of torch and transformers' Llama; it adds 80
HELP = """
import contextlib, io, json, sys
import oncelm_command
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        assert oncelm_command.main(arguments) == 0
    print(json.dumps([arguments, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_nothing_of_the_process_changes_and_nothing_heavy_is_imported() -> None:
    (line,) = run(CODE)
    found = json.loads(line)
    assert found["changed"] == []
    assert [name for name in found["imported"] if not name.startswith(("oncelm", "torch.utils"))] == []
    assert len(found["imported"]) < MOST_MODULES


def test_help_imports_neither_torch_nor_transformers() -> None:
    """Each verb's answer at once: in the command's process `import oncelm` waits for a verb that needs a model."""
    helps = [["--help"], [], ["--version"], *([verb, "--help"] for verb in VERBS if verb != "eval")]
    of_eval = [["eval", *part, "--help"] for part in ([], ["needle"], ["harness"], ["report"])]
    for line in run(HELP, json.dumps([*helps, *of_eval])):
        arguments, imported = json.loads(line)
        assert {"torch", "transformers", "psutil", "rich"}.isdisjoint(imported), arguments
        if arguments in helps:  # the options of eval's tasks stand in the tasks, which draw with numpy
            assert {"numpy", "safetensors", "yaml"}.isdisjoint(imported), arguments


def test_the_package_run_as_a_program_is_the_command() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "oncelm", "info", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "oncelm info" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "oncelm.cli.options" in imported
    assert "torch" not in imported


def test_every_public_name_is_there() -> None:
    for module in (oncelm, oncelm.engine, oncelm.eval):
        assert {*module.__all__} <= {*dir(module)}
        for name in module.__all__:
            assert getattr(module, name) is not None
        assert not hasattr(module, "nothing")
