"""Many requests at once on one machine: continuous batching over one shared key/value cache (docs/engine.md)."""

from typing import TYPE_CHECKING

from oncelm.utils.lazy import lazy_names

if TYPE_CHECKING:
    from oncelm.engine.async_llm import AsyncLLM
    from oncelm.engine.beam import BeamSearchParams
    from oncelm.engine.engine import Engine
    from oncelm.engine.llm import LLM
    from oncelm.engine.metrics import MetricsReport
    from oncelm.engine.options import EngineOptions
    from oncelm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from oncelm.engine.params import SamplingParams
    from oncelm.engine.single import make_engine
    from oncelm.engine.thread import EngineStopped

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "Engine",
    "EngineOptions",
    "EngineStopped",
    "Logprob",
    "MetricsReport",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "make_engine",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "oncelm.engine.async_llm": ("AsyncLLM",),
        "oncelm.engine.beam": ("BeamSearchParams",),
        "oncelm.engine.engine": ("Engine",),
        "oncelm.engine.llm": ("LLM",),
        "oncelm.engine.metrics": ("MetricsReport",),
        "oncelm.engine.options": ("EngineOptions",),
        "oncelm.engine.outputs": ("CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"),
        "oncelm.engine.params": ("SamplingParams",),
        "oncelm.engine.single": ("make_engine",),
        "oncelm.engine.thread": ("EngineStopped",),
    },
)
