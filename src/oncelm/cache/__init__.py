"""What a model remembers of the tokens it has read. README.md beside this file explains how the pieces fit."""

from oncelm.cache.batch import Batch, Selection
from oncelm.cache.disk import load_snapshot, save_snapshot
from oncelm.cache.fresh import FreshCache, FreshRetention, FreshWindow
from oncelm.cache.memory import HeldMemory, Memory, RetentionMemory, SharedMemory, WindowMemory
from oncelm.cache.model_cache import ModelCache, Snapshot
from oncelm.cache.retention_state import RetentionState
from oncelm.cache.shared_kv import SharedKV
from oncelm.cache.step import StepMemory
from oncelm.cache.window_kv import WindowKV

__all__ = [
    "Batch",
    "FreshCache",
    "FreshRetention",
    "FreshWindow",
    "HeldMemory",
    "Memory",
    "ModelCache",
    "RetentionMemory",
    "RetentionState",
    "Selection",
    "SharedKV",
    "SharedMemory",
    "Snapshot",
    "StepMemory",
    "WindowKV",
    "WindowMemory",
    "load_snapshot",
    "save_snapshot",
]
