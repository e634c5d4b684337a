"""docs/add-a-mixer.md is run: a mixer of under 80 lines in a file of its own trains, decodes and passes the ladder."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from oncelm.ops import rms_norm, swiglu
from tests.models import small
from tests.models import test_equality_ladder as ladder

PAGE = Path(__file__).parents[2] / "docs" / "add-a-mixer.md"
FILE, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the page's file, which is on Python's path."""
    folder = tmp_path_factory.mktemp("mixer")
    (folder / "my_mixer.py").write_text(FILE)
    sys.path.insert(0, str(folder))
    __import__("my_mixer")
    sys.path.remove(str(folder))
    return folder


def test_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(FILE.splitlines()) < 80
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in BLOCKS:
        exec(block, names)
    again, ids = names["again"], names["ids"]
    assert again.generate(ids[:, :30], max_new_tokens=5, do_sample=False)[0, 30:].tolist() == [30, 31, 32, 33, 34]


RUNGS = (
    ladder.test_any_pieces_on_one_cache_give_the_full_forward,
    ladder.test_chunked_prefill_then_decode,
    ladder.test_padding_anywhere_changes_nothing,
    ladder.test_packed_sequences,
    ladder.test_loss_and_gradients_on_any_targets,
)


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.__name__.removeprefix("test_"))
def test_its_mixer_passes_the_ladder(rung, folder: Path, models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small.KINDS, "moving average", {"self_decoder": "moving_average"})
    given = {} if rung is ladder.test_loss_and_gradients_on_any_targets else {"models": models}
    rung(kind="moving average", **given)


def test_it_is_undone_exactly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small.KINDS, "moving average", {"self_decoder": "moving_average"})
    model, ids = small.make_model("moving average"), torch.arange(12).view(2, 6)
    cache = model.new_cache(2, 20)
    model(ids, past_key_values=cache)
    cache.record()
    model(ids[:, :4], past_key_values=cache)
    cache.crop(-3)
    expected = model(torch.cat((ids, ids[:, :1], ids), dim=1), use_cache=False).logits[:, 7:]
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_kernels_leave_its_mixer_to_pytorch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding on a GPU with kernels in the rest of the layer, here with PyTorch in their place."""
    fused = pytest.importorskip("oncelm.models.yoco.fused", exc_type=ImportError)
    monkeypatch.setitem(small.KINDS, "moving average", {"self_decoder": "moving_average"})

    def norm_swiglu(y, weight, eps, fc1, gate):
        h = rms_norm(y, weight, eps)
        return swiglu(h @ fc1.T, h @ gate.T)

    monkeypatch.setattr(fused, "norm_swiglu", norm_swiglu)
    monkeypatch.setattr(fused, "linear_add", lambda h, weight, rows: rows + h @ weight.T)
    layer, (x, o, gate) = small.make_model("moving average").self_decoder.layers[0], torch.randn(3, 2, 1, 32)
    rotation = torch.ones(1, 1, 8, 2)
    torch.testing.assert_close(fused.before(layer, x, rotation), layer.before(x, rotation))
    torch.testing.assert_close(fused.after(layer, x, o, gate), layer.after(x, o, gate), rtol=1e-4, atol=1e-4)
