"""Evaluation: tasks (examples from seeds, and a scorer), a resumable runner, reports.

A task is a module with `examples(...)`, which yields `Example`s that depend on their arguments and seed alone, and
`score(example, output)`. The runner asks a model, writes a line a sample, and goes on where an earlier run stopped.
"""

from oncelm.eval.runner import Example, Reader, evaluate

__all__ = ["Example", "Reader", "evaluate"]
