"""The `oncelm` command: the only place from which `import oncelm` does not import torch and transformers.

A verb imports what it needs once its options are read, so that `oncelm VERB --help` answers at once. This module stands
outside the package, whose import comes before that of `oncelm.cli`: `oncelm/__init__.py` looks whether it is there.
"""

from oncelm.cli import main

__all__ = ["main"]
