"""What a model keeps of the tokens that it has read. README.md in this folder lists the files."""

from oncelm.cache.base import Snapshot
from oncelm.cache.batch import Batch, Selection
from oncelm.cache.disk import load_snapshot, save_snapshot
from oncelm.cache.yoco.cache import YocoCache
from oncelm.cache.yoco.interface import HeldPast, LayerCache, Past, Pasts, SharedPast
from oncelm.cache.yoco.recurrent_state import RecurrentState
from oncelm.cache.yoco.shared_kv import FreshShared, SharedKV
from oncelm.utils.lazy import renamed

__all__ = [
    "Batch",
    "FreshShared",
    "HeldPast",
    "LayerCache",
    "Past",
    "Pasts",
    "RecurrentState",
    "Selection",
    "SharedKV",
    "SharedPast",
    "Snapshot",
    "YocoCache",
    "load_snapshot",
    "save_snapshot",
]
__getattr__ = renamed(
    __name__,
    {
        "ModelCache": "YocoCache",
        "Memory": "Past",
        "HeldMemory": "HeldPast",
        "SharedMemory": "SharedPast",
        "RetentionState": "RecurrentState",
        "FreshCache": "Pasts",
        "WindowKV": "yoco.window_kv.WindowKV",
        "WindowMemory": "yoco.interface.WindowPast",
        "RetentionMemory": "yoco.interface.RecurrentPast",
        "FreshRetention": "yoco.recurrent_state.FreshRecurrent",
        "FreshWindow": "yoco.window_kv.FreshWindow",
    },
)
