"""Measuring prefill, decoding, memory and training, beside a Llama of the same shape, in one run.

yoco, llama = OwnTarget(...), PeerTarget(...)
records = run("prefill", [yoco, llama], [4096, 16384], dtype=torch.float32)
rich.print(table(records))
"""

from oncelm.bench.cases import CASES
from oncelm.bench.gate import GateError, check
from oncelm.bench.harness import HARNESS_TASKS, harness_table, run_harness
from oncelm.bench.measure import PeakMemory, Timing, measure
from oncelm.bench.needle import needle_table, run_needle
from oncelm.bench.ops import ops_table, run_ops
from oncelm.bench.ops_cases import OPS
from oncelm.bench.peer import PeerTarget, llama_config
from oncelm.bench.report import append_record, read_records, table
from oncelm.bench.roofline import Ceilings, measure_ceilings
from oncelm.bench.runner import run
from oncelm.bench.targets import OwnTarget, Target
from oncelm.models.work import LlamaWork, Work
from oncelm.utils.lazy import renamed

__all__ = [
    "CASES",
    "HARNESS_TASKS",
    "OPS",
    "Ceilings",
    "GateError",
    "LlamaWork",
    "OwnTarget",
    "PeakMemory",
    "PeerTarget",
    "Target",
    "Timing",
    "Work",
    "append_record",
    "check",
    "harness_table",
    "llama_config",
    "measure",
    "measure_ceilings",
    "needle_table",
    "ops_table",
    "read_records",
    "run",
    "run_harness",
    "run_needle",
    "run_ops",
    "table",
]

OLD = {"Subject": "Target", "Yoco": "OwnTarget", "LongLlama": "OwnTarget", "Llama": "PeerTarget"}
__getattr__ = renamed(__name__, OLD | {"plain_config": "llama_config"})
