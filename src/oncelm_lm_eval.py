"""Makes `lm_eval --model oncelm` work: lm-eval 0.4 has a registry of models, but looks for none outside itself.

torch calls `autoload` at the end of its own import (the entry point group `torch.backends`), in every process; so it
does nothing but look whether lm-eval is being imported. If so, the model's name goes into lm-eval's registry; OnceLM
itself is imported when lm-eval asks for that name. This module stands outside the package, whose import takes seconds.
"""

from __future__ import annotations

import sys


def autoload() -> None:
    """Tell lm-eval, where it is there already, which class `oncelm` names."""
    if "lm_eval" not in sys.modules:
        return
    try:
        import lm_eval.models  # noqa: F401  its own names, which it adds to an empty registry only
        from lm_eval.api.registry import model_registry
    except ImportError:  # another version of lm-eval
        return
    if "oncelm" not in model_registry:
        model_registry.register("oncelm", target="oncelm.eval.harness.adapter:OnceLM")
