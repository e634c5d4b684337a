"""`oncelm train`: a text file or folder to a trained model in a Hugging Face folder."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oncelm.cli.output import check_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from oncelm.data.batch import TrainData
    from oncelm.data.conversations import Conversation
    from oncelm.data.tokens import TokenFolder
    from oncelm.train.config import TrainConfig
    from oncelm.train.parallel.ranks import Ranks

DESCRIPTION = """\
Train a language model on a text file, a folder of text (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), a corpus
whose json/train.json weighs its sources, or a folder of tokens that `oncelm data prepare` made. Text is tokenized
once and kept; `oncelm data --help` has the formats.

DIR receives metrics.jsonl and TensorBoard curves, checkpoints and, at the end, the model in DIR/model,
which `oncelm generate --model DIR/model` reads. Ctrl-C saves a checkpoint; --resume goes on from it and
repeats the run exactly as if it had never stopped. `touch DIR/export` makes DIR/model now, while training goes on.

examples:
  oncelm train book.txt --out runs/book
      a tiny YOCO on the bytes of one book
  oncelm train books/ --out runs/books --config recipes/tiny-cpu.yaml --steps 2000
      a recipe, with one setting of it replaced
  oncelm train books/ --out runs/bpe --model yoco-small --tokenizer bpe:4096 --set lr=1e-3 seq_len=1024
      any setting by name; a tokenizer of 4096 entries is made from the data
  oncelm train books/ --out runs/wide --set model_overrides.hidden_size=384
      a preset with another shape
  oncelm train --out runs/books --resume
      go on with a stopped run, settings included
  oncelm train chats.jsonl --out runs/chat --model runs/books/model --set task=sft lr=1e-5
      supervised fine-tuning on conversations: only the assistant's tokens are learned
  oncelm train books/ --out runs/long --model path/to/llama --config recipes/longllama/small.yaml
      a LLaMA-family folder gets memory: a LongLLaMA, trained with crossbatch
  torchrun --nproc-per-node 8 -m oncelm train books/ --out runs/books --set chunk_parallel=2
      on 8 GPUs, each sequence split over 2 of them; the same batches, and so the same losses, as on one
  oncelm train books/ --dry-run
      print what would be done: every setting, parameters, memory, tokens (of N processes: --processes N)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="text, a corpus or prepared tokens")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (runs/ and DATA's name)")
    parser.add_argument("--model", help="a preset, or the folder of a model to start from (yoco-tiny)")
    parser.add_argument("--tokenizer", help="bytes, cl100k_base, bpe:SIZE or a path (bytes)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (1000)")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file of settings, as in recipes/")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="replace any setting; --dry-run lists them",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in DIR, if there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and needed, and stop")
    parser.add_argument("--processes", type=int, metavar="N", help="with --dry-run: as if torchrun had started N (1)")


def run(args: argparse.Namespace) -> int:
    from oncelm.utils.constraints import Whole, check_options

    check_options(args, {"processes": Whole(1, 2**20)})
    config = read_config(args)
    check_out(config)
    check_model(config)
    if args.dry_run:
        print(describe(config, args.processes or int(os.environ.get("WORLD_SIZE", "1"))))
        return 0

    import torch

    from oncelm.train.parallel.ranks import join_ranks
    from oncelm.train.plan import check_machine
    from oncelm.train.trainer import Trainer

    try:
        with join_ranks(config.device, tensor=config.tensor_parallel, chunk=config.chunk_parallel) as ranks:
            config.sequences_of_each(ranks.data.size)  # before any text is prepared
            model, dataset, tokenizer, digest = prepare(config, ranks)
            check_machine(model, config, ranks.rank.size, ranks.device)
            result = Trainer(model, dataset, config, tokenizer, ranks, digest).fit()
    except FloatingPointError as error:
        print(f"oncelm: training stopped: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(
            f"oncelm: {' '.join(str(error).split())[:160]}... Less memory is needed with a smaller batch_size (and a "
            "larger grad_accumulation), activation_checkpointing=true or more processes; --dry-run estimates it.",
            file=sys.stderr,
        )
        return 1
    if not ranks.is_main:
        return 0
    if result.interrupted:
        print(f"Stopped after step {result.step}; go on with: oncelm train --out {config.out} --resume")
        return 0
    held_out = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
    print(f"{result.step} steps, {result.tokens:,} tokens in {result.seconds:.0f} s{held_out}")
    print(f"Model: {result.model_path}")
    return 0


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The settings of a command line: recipe, then options, then --set; a resumed run starts from its own."""
    from oncelm.train.config import default_out, load_config

    recipe = args.config
    named = args.out is not None or any(override.startswith("out=") for override in args.set)
    out = default_out(args.data) if args.data is not None and not named else args.out
    if args.resume and recipe is None and out is not None:
        own = Path(out) / "config.yaml"
        recipe = own if own.exists() else None
    options = {name: getattr(args, name) for name in ("data", "out", "model", "tokenizer", "steps")}
    values: dict[str, object] = {name: value for name, value in options.items() if value is not None}
    return load_config(recipe, args.set, values | {"resume": args.resume})


def prepare(
    config: TrainConfig, ranks: Ranks
) -> tuple[PreTrainedModel, TrainData, PreTrainedTokenizerBase, str | None]:
    """The model, the data, the tokenizer that a run's settings name, and the data's checksum where it is known.

    Only the first rank's model has values.
    """
    import inspect

    from oncelm.train.checkpoint import check_new

    if not config.resume:  # before a tokenizer takes the place of that run's, and text is tokenized for nothing
        ranks.on_main(lambda: check_new(Path(config.out)))
    tokenizer = make_tokenizer(config, ranks)
    check_tokenizer(config, tokenizer)
    dataset, largest_id, digest = make_dataset(config, ranks, tokenizer)
    model = (make_model if ranks.is_main else empty_model)(config, len(tokenizer))
    vocab_size = model.config.vocab_size
    if largest_id >= vocab_size:
        raise ValueError(
            f"tokenizer {config.tokenizer!r} gives token {largest_id}, but model {config.model!r} knows "
            f"{vocab_size} tokens only; use the tokenizer it was made with."
        )
    if config.attends_within and "cu_seqlens" not in inspect.signature(model.forward).parameters:
        setting = 'task "sft"' if config.task == "sft" else "within_documents"
        raise ValueError(f"{setting} needs a model that takes cu_seqlens; {type(model).__name__} does not.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # for `generate`, once it is trained
        setattr(model.config, name, getattr(tokenizer, name))
        if model.generation_config is not None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    return model, dataset, tokenizer, digest


def make_dataset(config: TrainConfig, ranks: Ranks, tokenizer: PreTrainedTokenizerBase) -> tuple[TrainData, int, str]:
    """The data that the settings name, the largest token in it, and its checksum."""
    from oncelm.data.conversations import ConversationDataset, read_conversations
    from oncelm.data.crossbatch import CrossbatchDataset, sequence_tokens
    from oncelm.data.dataset import TokenDataset

    if config.task == "sft":
        read = read_conversations(config.data, tokenizer, config.seq_len)
        conversations = ConversationDataset(
            read,
            config.seq_len,
            pad_id=tokenizer.pad_token_id or 0,
            seed=config.seed,
            validation_share=config.validation_share,
        )
        return conversations, conversations.largest_id, digest_conversations(read)
    tokens = ranks.main_first(lambda: open_data(config, tokenizer))
    options: dict[str, Any] = {
        "seed": config.seed,
        "validation": tokens.valid,
        "validation_share": config.validation_share,
        "long_documents": config.long_documents,
        "long_factor": config.long_factor,
        "min_tokens": config.min_tokens,
        "document_masking": config.within_documents,
    }
    dataset: TokenDataset | CrossbatchDataset
    if config.packing is None:
        dataset = TokenDataset(tokens.train, config.seq_len, **options)
    else:
        length = sequence_tokens(config.seq_len, config.packing)
        try:
            dataset = CrossbatchDataset(TokenDataset(tokens.train, length, **options), config.packing)
        except ValueError as error:
            raise ValueError(
                f"packing {config.packing} rows of {config.seq_len} takes sequences of {length}: {error}"
            ) from error
    return dataset, tokens.largest_id, digest_tokens(tokens)


def digest_tokens(tokens: TokenFolder) -> str:
    """SHA-256 of all that batches are drawn from: names, weights and shards, whose keys are checksums of the text."""
    parts = [
        [(source.name, source.weight, [shard["key"] for shard in source.stream.shards]) for source in split]
        for split in (tokens.train, tokens.valid)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def digest_conversations(conversations: Sequence[Conversation]) -> str:
    """SHA-256 of the tokens of all of them, in order, and of which are learned."""
    digest = hashlib.sha256()
    for one in conversations:
        digest.update(len(one.tokens).to_bytes(8) + one.tokens.tobytes() + one.answer.tobytes())
    return digest.hexdigest()


def open_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TokenFolder:
    """The tokens of the settings' data, made now where it is text that was not tokenized before."""
    from oncelm.data.encoding import Encoder
    from oncelm.data.layout import find_corpus
    from oncelm.data.prepare import prepare as prepare_tokens
    from oncelm.data.tokens import is_token_folder, open_tokens

    if is_token_folder(config.data):
        tokens = open_tokens(config.data)
        if config.tokenizer is not None and Encoder(tokenizer).fingerprint() != tokens.manifest["tokenizer"]:
            raise ValueError(
                f"data {config.data!r} was prepared with another tokenizer than {config.tokenizer!r}; leave tokenizer "
                "out to use the one it has, or prepare the text again."
            )
        if config.bos and not tokens.manifest["bos"]:
            raise ValueError(f"data {config.data!r} was prepared without bos; prepare the text again with --bos.")
        return tokens
    corpus = find_corpus(config.data)
    tokens = open_tokens(prepare_tokens(corpus, tokenizer, config.tokens, bos=config.bos))
    malformed = tokens.manifest["malformed"]
    if malformed["count"]:
        first = malformed["examples"][0]
        logging.getLogger(__name__).warning("left out %s malformed lines, the first: %s", malformed["count"], first)
    if corpus.left_out:
        logging.getLogger(__name__).warning("%s", corpus.left_out)
    return tokens


def make_tokenizer(config: TrainConfig, ranks: Ranks | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer the settings name; one made from the data is kept in `out/tokenizer` to resume with."""
    from oncelm.data.bpe import make_bpe
    from oncelm.data.layout import find_corpus
    from oncelm.data.tokenizers import load_tokenizer
    from oncelm.data.tokens import is_token_folder
    from oncelm.train.claim import claim, run_lock
    from oncelm.train.config import bpe_vocab_size

    if config.tokenizer is None and is_token_folder(config.data):
        return load_tokenizer(Path(config.data) / "tokenizer")
    if config.tokenizer is None:
        return load_tokenizer(config.model if Path(config.model).is_dir() else "bytes")
    if not config.tokenizer.startswith("bpe:"):
        return load_tokenizer(config.tokenizer)
    kept = Path(config.out) / "tokenizer"

    size = bpe_vocab_size(config.tokenizer)

    def make() -> None:
        if not (config.resume and kept.exists()):
            corpus, lock = find_corpus(config.data), run_lock(kept.parent)
            claim(lock)  # a run that goes on there would be resumed with this tokenizer
            try:
                make_bpe(kept, corpus, size)
            finally:
                lock.release()

    make() if ranks is None else ranks.on_main(make)
    return load_tokenizer(kept)


def check_out(config: TrainConfig) -> None:
    """ValueError where the run's folder could not be one, or is of a run that made itself another tokenizer."""
    from oncelm.train.config import load_config

    out = Path(config.out)
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out {str(out)!r} cannot be a folder: {str(folder)!r} is a file; choose another --out.")
    check_place(out, "--out")
    if not (config.resume and (out / "tokenizer").exists() and (out / "config.yaml").exists()):
        return
    before = load_config(out / "config.yaml").tokenizer
    if before != config.tokenizer:
        raise ValueError(
            f"tokenizer {config.tokenizer!r} is not that of the run in {str(out)!r}, {before!r}, whose weights are for "
            "its tokens; leave tokenizer out to resume it, or choose another --out."
        )


def check_tokenizer(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where the model is a folder whose own tokenizer has other tokens; added ones may differ."""
    from oncelm.data.tokenizers import load_tokenizer
    from oncelm.data.tokens import is_token_folder

    if not Path(config.model).is_dir():
        return
    try:
        own = load_tokenizer(config.model)
    except (ValueError, ImportError):  # there is none, or none that could be compared
        return
    added = own.get_added_vocab().keys() | tokenizer.get_added_vocab().keys()
    known, given = (
        {token: index for token, index in one.get_vocab().items() if token not in added} for one in (own, tokenizer)
    )
    if known != given:
        prepared = config.tokenizer is None and is_token_folder(config.data)
        source = f"data {config.data!r} was prepared with" if prepared else f"tokenizer {config.tokenizer!r} has"
        remedy = f"prepare the text again with --tokenizer {config.model}" if prepared else "leave tokenizer out"
        raise ValueError(
            f"{source} other tokens ({len(given):,}) than model {config.model!r} was trained on ({len(known):,}); "
            f"{remedy}, or start from a preset."
        )


def check_model(config: TrainConfig) -> None:
    """ValueError unless the model that the settings name fits their packing; nothing is read but its configuration."""
    from oncelm.train.crossbatch import check_crossbatch

    if config.packing is not None or "mem_layers" in config.model_overrides or Path(config.model).is_dir():
        check_crossbatch(config, empty_model(replace(config, packing=None), vocab_size=1024).config)


def empty_model(config: TrainConfig, vocab_size: int) -> PreTrainedModel:
    """What `make_model` makes, without values (on the meta device): no weights are read."""
    import torch
    from transformers import AutoModelForCausalLM

    from oncelm.models.load import read_config as model_config

    with torch.device("meta"):
        if not Path(config.model).is_dir():
            return make_model(config, vocab_size)
        found = model_config(config.model)
        if found.model_type == "oncelm_yoco":
            found = type(found)(**{key: getattr(found, key) for key in found.own_keys()} | config.model_overrides)
        else:
            found = model_config(config.model, **model_overrides(config))
        return AutoModelForCausalLM.from_config(found)


def model_overrides(config: TrainConfig) -> dict[str, Any]:
    """The settings' own, and what packing sets."""
    return config.model_overrides | ({} if config.packing is None else {"dataset_packing": config.packing})


def make_model(config: TrainConfig, vocab_size: int) -> PreTrainedModel:
    """The model the settings name: a folder's, or a new one of a preset, of YOCO or Llama."""
    from oncelm import models
    from oncelm.models.llama import LLAMA_PRESETS
    from oncelm.models.load import read_config as model_config
    from oncelm.models.yoco.presets import PRESETS
    from oncelm.utils.errors import check_choice

    if Path(config.model).is_dir():
        if model_config(config.model).model_type == "oncelm_yoco":
            return with_settings(models.load(config.model), config.model_overrides)
        return models.load(config.model, **model_overrides(config))
    check_choice("model", config.model, (*PRESETS, *LLAMA_PRESETS))
    return models.build_model(config.model, seed=config.seed, **{"vocab_size": vocab_size, **model_overrides(config)})


def with_settings(model: PreTrainedModel, overrides: dict[str, Any]) -> PreTrainedModel:
    """A YOCO's weights under another configuration, such as a larger rope_theta; ValueError where they do not fit."""
    import torch

    from oncelm.models import YocoConfig

    if not overrides:
        return model
    settings = {key: getattr(model.config, key) for key in YocoConfig.own_keys()}
    with torch.device("meta"):
        changed = type(model)(YocoConfig(**(settings | overrides)))
    try:
        changed.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(
            f"model_overrides {overrides} do not fit the weights of the folder given: {reason}; override what changes "
            "no shape, as rope_theta and max_position_embeddings."
        ) from None
    changed.tie_weights()
    changed.generation_config = model.generation_config
    return changed


def describe(config: TrainConfig, processes: int) -> str:
    """What a run would do; nothing is written, and a preset's weights are not allocated."""
    import torch

    from oncelm.train.config import bpe_vocab_size
    from oncelm.train.plan import describe_plan

    if config.tokenizer is not None and config.tokenizer.startswith("bpe:"):
        vocab_size = bpe_vocab_size(config.tokenizer)
    else:
        tokenizer = make_tokenizer(config)
        check_tokenizer(config, tokenizer)
        vocab_size = len(tokenizer)
    is_preset = not Path(config.model).is_dir()
    with torch.device("meta") if is_preset else contextlib.nullcontext():
        model = make_model(config, vocab_size)
    return f"{config.to_yaml()}\n{describe_plan(config, model, describe_data(config), processes)}"


def describe_data(config: TrainConfig) -> str:
    """What there is to train on, in words."""
    from oncelm.data.conversations import conversation_files
    from oncelm.data.layout import find_corpus
    from oncelm.data.tokens import is_token_folder, open_tokens
    from oncelm.utils.units import size

    if config.task == "sft":
        files = conversation_files(config.data).files
        return f"conversations, {len(files)} file(s), {size(sum(file.stat().st_size for file in files))}"
    if is_token_folder(config.data):
        count = sum(source.stream.num_tokens for source in open_tokens(config.data).train)
        return f"{count:,} tokens, prepared"
    corpus = find_corpus(config.data)
    num_files = sum(len(source.files) for source in corpus.sources)
    return f"{len(corpus.train)} source(s), {num_files} file(s), {size(corpus.num_bytes())}"
