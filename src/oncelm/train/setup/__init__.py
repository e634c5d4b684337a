"""Makes a trainer from a run's settings: data, tokenizer, model.

config = TrainConfig.from_yaml("recipe.yaml", data="books/")
result = make_trainer(config).train()
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path

from oncelm.train.checkpoint import check_new
from oncelm.train.config import TrainConfig
from oncelm.train.parallel.mesh import Mesh
from oncelm.train.plan import check_machine, describe_plan
from oncelm.train.setup.dataset import describe_data, make_dataset
from oncelm.train.setup.model import check_model, make_model
from oncelm.train.setup.tokenizer import check_tokenizer, make_tokenizer
from oncelm.train.trainer import Trainer
from oncelm.utils.device import resolve_device
from oncelm.utils.files import check_place
from oncelm.utils.vocabulary import bpe_size


def make_trainer(config: TrainConfig, mesh: Mesh | None = None) -> Trainer:
    """A trainer of the run that the settings describe; `train()` runs it. Text is tokenized here, if it was not before.

    Args:
        mesh: this process among those that train together (`join_mesh`); None: it is alone.

    Raises:
        ValueError: settings, data, tokenizer and model do not fit each other, or the machine; `out` holds another run.
    """
    check_out(config)
    check_model(config)
    if mesh is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("torchrun started several processes: give make_trainer the mesh of `join_mesh`.")
    mesh = mesh or Mesh(resolve_device(None if config.device == "auto" else config.device))
    config.sequences_of_each(mesh.data.size)  # before any text is prepared
    if not config.resume:  # before a tokenizer takes the place of that run's, and text is tokenized for nothing
        mesh.on_main(lambda: check_new(Path(config.out)))
    tokenizer = make_tokenizer(config, mesh)
    check_tokenizer(config, tokenizer)
    dataset, largest_id, digest = make_dataset(config, mesh, tokenizer)
    model = make_model(config, len(tokenizer), weights=mesh.is_main)
    vocab_size = model.config.vocab_size
    if largest_id >= vocab_size:
        raise ValueError(
            f"tokenizer {config.tokenizer!r} gives token {largest_id}, but model {config.model!r} knows "
            f"{vocab_size} tokens only; use the tokenizer it was made with."
        )
    if config.masks_documents and "cu_seqlens" not in inspect.signature(model.forward).parameters:
        setting = 'task "sft"' if config.task == "sft" else "document_masking"
        raise ValueError(f"{setting} needs a model that takes cu_seqlens; {type(model).__name__} does not.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # for `generate`, once it is trained
        setattr(model.config, name, getattr(tokenizer, name))
        if model.generation_config is not None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    check_machine(model, config, mesh.world.size, mesh.device)
    return Trainer(model, dataset, config, tokenizer, mesh, digest)


def describe_run(config: TrainConfig, processes: int = 1) -> str:
    """What a run would do; nothing is written, and no weights are read or allocated."""
    check_out(config)
    check_model(config)
    vocab_size = None if config.tokenizer is None else bpe_size(config.tokenizer)
    if vocab_size is None:
        tokenizer = make_tokenizer(config)
        check_tokenizer(config, tokenizer)
        vocab_size = len(tokenizer)
    model = make_model(config, vocab_size, weights=False)
    return f"{config.to_yaml()}\n{describe_plan(config, model, describe_data(config), processes)}"


def check_out(config: TrainConfig) -> None:
    """ValueError where the run's folder could not be one, or is of a run that made itself another tokenizer."""
    out = Path(config.out)
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out {str(out)!r} cannot be a folder: {str(folder)!r} is a file; choose another --out.")
    check_place(out, "--out")
    if not (config.resume and (out / "tokenizer").exists() and (out / "config.yaml").exists()):
        return
    before = TrainConfig.from_yaml(out / "config.yaml").tokenizer
    if before != config.tokenizer:
        raise ValueError(
            f"tokenizer {config.tokenizer!r} is not that of the run in {str(out)!r}, {before!r}, whose weights are for "
            "its tokens; leave tokenizer out to resume it, or choose another --out."
        )
