"""The data that a run's settings name."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from oncelm.data.batch import TrainData
from oncelm.data.conversations import Conversation, ConversationDataset, conversation_files, read_conversations
from oncelm.data.crossbatch import CrossbatchDataset, sequence_tokens
from oncelm.data.dataset import TokenDataset
from oncelm.data.encoding import Encoder
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import prepare
from oncelm.data.tokens import TokenFolder, is_token_folder, open_tokens
from oncelm.train.config import TrainConfig
from oncelm.train.parallel.mesh import Mesh
from oncelm.utils.units import size

logger = logging.getLogger(__name__)


def make_dataset(config: TrainConfig, mesh: Mesh, tokenizer: PreTrainedTokenizerBase) -> tuple[TrainData, int, str]:
    """The data that the settings name, the largest token in it, and its checksum."""
    if config.task == "sft":
        read = read_conversations(config.data, tokenizer, config.seq_len)
        conversations = ConversationDataset(
            read,
            config.seq_len,
            pad_id=tokenizer.pad_token_id or 0,
            seed=config.seed,
            validation_fraction=config.validation_fraction,
        )
        return conversations, conversations.largest_id, digest_conversations(read)
    tokens = mesh.main_first(lambda: open_data(config, tokenizer))
    options: dict[str, Any] = {
        "seed": config.seed,
        "validation": tokens.valid,
        "validation_fraction": config.validation_fraction,
        "long_documents": config.long_documents,
        "long_factor": config.long_factor,
        "min_tokens": config.min_tokens,
        "document_masking": config.document_masking,
    }
    if config.crossbatch_rows is None:
        dataset: TrainData = TokenDataset(tokens.train, config.seq_len, **options)
    else:
        length = sequence_tokens(config.seq_len, config.crossbatch_rows)
        try:
            dataset = CrossbatchDataset(TokenDataset(tokens.train, length, **options), config.crossbatch_rows)
        except ValueError as error:
            raise ValueError(
                f"crossbatch_rows {config.crossbatch_rows} of {config.seq_len} tokens take {length}: {error}"
            ) from error
    return dataset, tokens.largest_id, digest_tokens(tokens)


def open_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TokenFolder:
    """The tokens of the settings' data, made now where it is text that was not tokenized before."""
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
    tokens = open_tokens(prepare(corpus, tokenizer, config.tokens, bos=config.bos))
    malformed = tokens.manifest["malformed"]
    if malformed["count"]:
        first = malformed["examples"][0]
        logger.warning("left out %s malformed lines, the first: %s", malformed["count"], first)
    if corpus.left_out:
        logger.warning("%s", corpus.left_out)
    return tokens


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


def describe_data(config: TrainConfig) -> str:
    """What there is to train on, in words."""
    if config.task == "sft":
        files = conversation_files(config.data).files
        return f"conversations, {len(files)} file(s), {size(sum(file.stat().st_size for file in files))}"
    if is_token_folder(config.data):
        count = sum(source.stream.num_tokens for source in open_tokens(config.data).train)
        return f"{count:,} tokens, prepared"
    corpus = find_corpus(config.data)
    num_files = sum(len(source.files) for source in corpus.sources)
    return f"{len(corpus.train)} source(s), {num_files} file(s), {size(corpus.num_bytes())}"
