"""`oncelm convert`: the same logits in another folder, and nothing lost when it fails."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import oncelm
from oncelm.cli import main
from oncelm.models.yoco.official import write_official
from tests.full_disk import no_space, small_files
from tests.models.small import make_model


@pytest.fixture(scope="module")
def model() -> oncelm.YocoForCausalLM:
    return make_model("retention")


@pytest.fixture
def folders(model, tmp_path) -> Path:
    """A folder with the same model in both formats, and another model to overwrite."""
    write_official(model, tmp_path / "official")
    model.save_pretrained(tmp_path / "hf")
    make_model("window").save_pretrained(tmp_path / "old")
    return tmp_path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None], use_cache=False).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def convert(*arguments: str | Path) -> int:
    return main(["convert", *(str(argument) for argument in arguments)])


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "files"),
    [
        ("official", [], {"config.json", "generation_config.json", "model.safetensors"}),
        ("hf", [], {"params.json", "checkpoint.pth"}),
        ("hf", ["--to", "hf"], {"config.json", "generation_config.json", "model.safetensors"}),
        ("official", ["--to", "official"], {"params.json", "checkpoint.pth"}),
    ],
)
def test_logits_stay_the_same(source, options, files, folders, model, capsys) -> None:
    before = contents(folders / source)
    assert convert(folders / source, folders / "new", *options) == 0
    files |= {"SHA256SUMS"}
    assert set(contents(folders / "new")) == files
    assert torch.equal(logits(oncelm.load(folders / "new")), logits(model))
    assert contents(folders / source) == before
    shown = capsys.readouterr().out
    assert f"{model.num_parameters():,} parameters in float32" in shown
    assert all(file in shown for file in files)


@pytest.mark.parametrize("name", ["gret", "swa"])
def test_the_official_codes_own_folders(name, golden, tmp_path) -> None:
    source = golden / "yoco" / name
    assert convert(source, tmp_path / "hf") == 0
    assert convert(tmp_path / "hf", tmp_path / "official") == 0
    wanted = logits(oncelm.load(source))
    for folder in ("hf", "official"):
        assert torch.equal(logits(oncelm.load(tmp_path / folder)), wanted)
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(auto.eval()), wanted)


def test_dtype(folders, model) -> None:
    assert convert(folders / "official", folders / "half", "--dtype", "bfloat16") == 0
    assert oncelm.load(folders / "half").dtype == torch.bfloat16
    assert convert(folders / "half", folders / "back", "--dtype", "float32") == 0
    wide = make_model("retention").to(torch.bfloat16).float()
    assert torch.equal(logits(oncelm.load(folders / "back")), logits(wide))


def test_an_existing_folder_is_replaced_only_when_asked(folders, model, capsys) -> None:
    before = contents(folders / "old")
    assert convert(folders / "official", folders / "old") == 2
    assert "exists; choose another folder, or replace it with --overwrite" in capsys.readouterr().err
    assert contents(folders / "old") == before
    assert convert(folders / "official", folders / "old", "--overwrite") == 0
    assert torch.equal(logits(oncelm.load(folders / "old")), logits(model))
    assert sorted(path.name for path in folders.iterdir()) == ["hf", "official", "old"]


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_tokenizer_named_or_the_sources_own(tmp_path, capsys) -> None:
    write_official(make_model("retention", vocab_size=260), tmp_path / "official")
    assert convert(tmp_path / "official", tmp_path / "without") == 0
    assert "no tokenizer found to save beside it" in capsys.readouterr().err
    assert convert(tmp_path / "official", tmp_path / "with", "--tokenizer", "bytes") == 0
    assert oncelm.load_tokenizer(tmp_path / "with")("Hi").input_ids == [76, 109]
    assert convert(tmp_path / "with", tmp_path / "again", "--to", "hf") == 0
    assert oncelm.load_tokenizer(tmp_path / "again")("Hi").input_ids == [76, 109]


@pytest.mark.slow
def test_cl100k_base_for_its_vocabulary(tmp_path) -> None:
    try:
        tokenizer = oncelm.load_tokenizer("cl100k_base")
    except ImportError as error:
        pytest.skip(str(error))
    small = {"hidden_size": 8, "intermediate_size": 8, "num_self_heads": 1, "num_attention_heads": 2}
    write_official(make_model("retention", vocab_size=len(tokenizer), **small), tmp_path / "official")
    assert convert(tmp_path / "official", tmp_path / "hf") == 0
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert saved("Call me Ishmael.").input_ids == tokenizer("Call me Ishmael.").input_ids


# -- mistakes ---------------------------------------------------------------------------------------------------------


def make_llama(folders: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folders / "llama")
    return folders / "llama"


def damaged(folders: Path) -> Path:
    (folders / "official" / "params.json").write_text("{")
    return folders / "official"


MISTAKES: dict[str, tuple[Callable[[Path], list[str | Path]], str]] = {
    "unknown format": (
        lambda f: [f / "hf", f / "new", "--to", "offical"],
        "unknown --to 'offical'; did you mean 'offici",
    ),
    "no source": (lambda f: [f / "nowhere", f / "new"], "no model folder at"),
    "damaged source": (lambda f: [damaged(f), f / "new"], "params.json is not JSON"),
    "source is target": (lambda f: [f / "hf", f / "hf", "--overwrite"], "is SOURCE or contains it"),
    "source in target": (lambda f: [f / "hf", f, "--overwrite"], "is SOURCE or contains it"),
    "target a file": (
        lambda f: [f / "hf", f / "old" / "config.json", "--overwrite"],
        "is no model folder, and --overw",
    ),
    "target no model": (lambda f: [f / "hf", f / "things", "--overwrite"], "is no model folder, and --overwrite"),
    "not a YOCO": (lambda f: [make_llama(f), f / "new"], "only YOCO models have an official format"),
    "no official form": (lambda f: [f / "old", f / "new"], "the official format has only num_self_key_value_heads=2"),
    "official tokenizer": (lambda f: [f / "hf", f / "new", "--tokenizer", "bytes"], "--tokenizer goes with --to hf"),
    "large tokenizer": (
        lambda f: [f / "official", f / "new", "--tokenizer", "bytes"],
        "tokenizer 'bytes' has 260 tokens, the model knows 61 only",
    ),
    "dtype": (
        lambda f: [f / "official", f / "new", "--dtype", "float61"],
        "unknown dtype 'float61'; did you mean 'flo",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_change_nothing(case, folders, capsys) -> None:
    arguments, message = MISTAKES[case]
    (folders / "things").mkdir()
    (folders / "things" / "precious.txt").write_text("precious")
    prepared = arguments(folders)
    before = contents(folders)
    capsys.readouterr()
    assert convert(*prepared) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert contents(folders) == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_killed_while_it_replaces_a_folder_the_next_command_finds_one(call, folders, monkeypatch, capsys) -> None:
    """Between two renames where two folders cannot change places at once."""
    before, calls, replace = contents(folders / "old"), [], Path.replace

    def die_at(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr("oncelm.utils.files._exchange", lambda *paths: False)
        monkeypatch.setattr(Path, "replace", die_at)
        convert(folders / "official", folders / "old", "--overwrite")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (folders / "old").exists() == (call != 3)
    capsys.readouterr()
    assert convert(folders / "hf", folders / "old") == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert contents(folders / "old") == before
    assert convert(folders / "old", folders / "new", "--to", "hf") == 0
    assert convert(folders / "official", folders / "old", "--overwrite") == 0
    assert {path.name for path in folders.iterdir()} == {"official", "hf", "old", "new"}


@pytest.mark.parametrize("source", ["official", "hf"])
def test_what_is_written_has_checksums(source, folders, capsys) -> None:
    assert convert(folders / source, folders / "new") == 0
    capsys.readouterr()
    assert main(["info", "--verify", str(folders / "new")]) == 0
    assert "files are as they were written" in capsys.readouterr().out
    files = sorted((folders / "new").iterdir())
    assert len(files) == 3 if source == "hf" else 4
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        assert main(["info", "--verify", str(folders / "new")]) == 2
        with pytest.raises(ValueError, match="is damaged"):
            oncelm.load(folders / "new", verify=True)
        file.write_bytes(whole)
    oncelm.load(folders / "new", verify=True)
    assert main(["info", "--verify", str(folders / "hf")]) == 2
    assert "cannot be verified: it is no folder with checksums (SHA256SUMS)" in capsys.readouterr().err
    assert main(["info", "--verify"]) == 2
    assert "--verify goes with a MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [no_space, small_files])
@pytest.mark.parametrize("source", ["official", "hf"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_full_disk_leaves_everything_as_it_was(failure, source, overwrite, folders, capfd) -> None:
    if not overwrite:
        shutil.rmtree(folders / "old")
    before = contents(folders)
    capfd.readouterr()
    with failure():
        assert convert(folders / source, folders / "old", *(["--overwrite"] if overwrite else [])) == 2
    error = capfd.readouterr().err
    assert error.startswith("oncelm: error: ")
    assert error.count("\n") == 1
    assert contents(folders) == before
    assert {path.name for path in folders.iterdir()} == {"official", "hf"} | ({"old"} if overwrite else set())
