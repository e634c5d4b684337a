"""lm-eval's tasks, asked fast: prefixes read once, YOCO's cross-decoder run only where a token is scored.

`suite` holds the tables of the papers as tasks of `oncelm eval`; `adapter.OnceLM` serves lm-eval itself. lm-eval
(extra `eval`) is imported when a run begins, and by the adapter.
"""
