"""What a model remembers of the tokens it has read. README.md beside this file explains how the pieces fit."""

from oncelm.cache.base import Snapshot
from oncelm.cache.batch import Batch, Selection
from oncelm.cache.disk import load_snapshot, save_snapshot
from oncelm.cache.yoco.cache import YocoCache
from oncelm.cache.yoco.fresh import FreshPast, FreshRetention, FreshWindow
from oncelm.cache.yoco.interface import HeldPast, Past, RetentionPast, SharedPast, WindowPast
from oncelm.cache.yoco.retention_state import RetentionState
from oncelm.cache.yoco.shared_kv import SharedKV
from oncelm.cache.yoco.step import StepPast
from oncelm.cache.yoco.window_kv import WindowKV

__all__ = [
    "Batch",
    "FreshPast",
    "FreshRetention",
    "FreshWindow",
    "HeldPast",
    "Past",
    "RetentionPast",
    "RetentionState",
    "Selection",
    "SharedKV",
    "SharedPast",
    "Snapshot",
    "StepPast",
    "WindowKV",
    "WindowPast",
    "YocoCache",
    "load_snapshot",
    "save_snapshot",
]
