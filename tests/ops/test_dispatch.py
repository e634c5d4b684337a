"""Which implementation serves which device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oncelm.ops import dispatch
from oncelm.ops.dispatch import TABLE, Implementation, choose, implementation

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", TABLE)
def test_every_op_has_a_portable_row_and_a_reference(op: str) -> None:
    assert TABLE[op][-1].backend == "naive"
    for device in ("cpu", "cuda", "mps"):
        assert any(device in row.devices and row.needs is None for row in TABLE[op])
    assert callable(implementation(op, "auto", CPU))


def test_auto_skips_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Implementation("fast", "nowhere:f", ("cpu",), "not here", needs="a_package_that_is_not_there")
    monkeypatch.setitem(dispatch.TABLE, "gated_retention", (missing, *TABLE["gated_retention"]))
    assert choose("gated_retention", "auto", CPU).backend == "chunk"
    with pytest.raises(
        ValueError, match="needs a_package_that_is_not_there: `pip install a_package_that_is_not_there`"
    ):
        choose("gated_retention", "fast", CPU)
    named = replace(missing, package="oncelm[fast]")
    monkeypatch.setitem(dispatch.TABLE, "gated_retention", (named, *TABLE["gated_retention"]))
    with pytest.raises(ValueError, match=r"`pip install oncelm\[fast\]`"):
        choose("gated_retention", "fast", CPU)


def test_wrong_backends() -> None:
    with pytest.raises(ValueError, match="did you mean 'naive'"):
        choose("global_attention", "naiv", CPU)
    with pytest.raises(ValueError, match="no implementation of global_attention runs on meta"):
        choose("global_attention", "auto", torch.device("meta"))
    with pytest.raises(ValueError, match="runs on cuda, not on cpu"):
        choose("gated_retention", "triton", CPU)
