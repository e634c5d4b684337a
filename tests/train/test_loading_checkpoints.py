"""A checkpoint as a model: loaded or converted as it was written, or refused by the name of the damaged file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import oncelm
from oncelm.cli import main
from oncelm.data.tokenizers import load_tokenizer
from oncelm.train.checkpoint import save_checkpoint
from oncelm.train.saving import OPTIMIZER
from oncelm.utils.checksums import MANIFEST
from tests.models.small import make_long, make_model

FLIPS = 60


@pytest.fixture(params=["retention", "long"])
def model(request):
    return make_long() if request.param == "long" else make_model(request.param)


@pytest.fixture(params=["lone", "sharded"])
def checkpoint(request, model, tmp_path: Path) -> Path:
    """As `oncelm.train.saving` writes it, of one process or as those of many are."""

    def write(folder: Path) -> None:
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        for part, tensors in ((".", weights), (OPTIMIZER, {"exp_avg": torch.ones(2000)})):
            writer = HuggingFaceStorageWriter(str(folder / part), save_distributed=request.param == "sharded")
            dcp.save(tensors, storage_writer=writer, no_dist=True)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        load_tokenizer("bytes").save_pretrained(folder)
        (folder / "trainer.json").write_text(json.dumps({"step": 3}))

    return save_checkpoint(tmp_path / "checkpoints", 3, write, keep=1)


def test_a_whole_one_loads(checkpoint: Path, model) -> None:
    for verify in (None, True, False):
        loaded = oncelm.load(checkpoint, device="cpu", verify=verify).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_every_flip_is_noticed(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """A bit of a byte of a file, all of them drawn; no load, no conversion, no silence of `info --verify`."""
    draw = random.Random(0)
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    assert len(files) >= 7
    for number in range(FLIPS):
        file = files[number % len(files)]
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        named = "" if file.name == MANIFEST else file.name  # in which a flip is one of some file's checksum
        with pytest.raises(ValueError, match=f"is damaged: .*{named}"):
            oncelm.load(checkpoint)
        if number < len(files):
            assert main(["convert", str(checkpoint), str(tmp_path / "model")]) == 2
            assert not (tmp_path / "model").exists()
            assert main(["info", "--verify", str(checkpoint)]) == 2
            assert named in capsys.readouterr().err
        file.write_bytes(whole)
    oncelm.load(checkpoint)


def test_without_the_optimizer_a_model_is_whole(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / OPTIMIZER)
    oncelm.load(checkpoint)
    with pytest.raises(ValueError, match=r"optimizer/.* is missing"):
        oncelm.load(checkpoint, verify=True)


def test_a_damaged_one_can_be_loaded_on_purpose(checkpoint: Path) -> None:
    (checkpoint / "trainer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trainer\.json does not match its checksum"):
        oncelm.load(checkpoint)
    oncelm.load(checkpoint, verify=False)
