"""What `import oncelm` changes in a process: nothing but the models that transformers knows."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, logging, os, random, sys, warnings
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

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
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "imported": sorted(set(sys.modules) - modules),
}))
"""
PARTS = ("oncelm", "transformers", "sentencepiece", "tokenizers", "importlib", "torch.utils")


def test_nothing_of_the_process_changes_and_nothing_heavy_is_imported() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["changed"] == []
    assert [name for name in found["imported"] if not name.startswith(PARTS)] == []
