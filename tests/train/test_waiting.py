"""A forward and backward pass of training waits for no value of the device, whatever data it is given."""

from __future__ import annotations

import json

import pytest
import torch

from oncelm.data.batch import TrainBatch
from oncelm.data.conversations import ConversationDataset, read_conversations
from oncelm.data.tokenizers import load_tokenizer
from oncelm.train.config import TrainConfig
from oncelm.train.parallel.mesh import Mesh
from oncelm.train.trainer import Trainer
from tests.models.small import make_long, make_model
from tests.stand_ins import install


@pytest.fixture
def batches(tmp_path) -> list[TrainBatch]:
    """Whole rows; rows of documents; conversations, of which answers are learned."""
    tokens = torch.arange(64).view(4, 16) % 60 + 1
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": "a" * n, "response": "b" * n}) + "\n" for n in range(1, 9)))
    tokenizer = load_tokenizer("bytes")
    conversations = ConversationDataset(read_conversations(chats, tokenizer, 64), 64).batch(0, 2)
    return [TrainBatch(tokens), TrainBatch(tokens, lengths=(3, 13, 16, 1, 15, 16)), conversations]


def make_trainer(tmp_path, device: str, kind: str) -> Trainer:
    model = make_long(vocab_size=260) if kind == "long" else make_model(kind, vocab_size=260)
    config = TrainConfig(data="unused", out=str(tmp_path), seq_len=16, batch_size=2, dtype="bfloat16")
    return Trainer(model.train(), None, config, mesh=Mesh(torch.device(device)))


KINDS = pytest.mark.parametrize("kind", ["retention", "window", "long"])


@KINDS
def test_no_value_is_read(tmp_path, monkeypatch, batches, kind: str) -> None:
    trainer = make_trainer(tmp_path, "cpu", kind)
    trainer.model.to("meta")
    trainer.mesh = Mesh(torch.device("meta"))
    install(monkeypatch)
    for batch in batches:
        trainer._loss(batch.split(2)[0], 7.0).backward()


@pytest.mark.gpu
@KINDS
def test_a_gpu_is_not_waited_for(tmp_path, batches, kind: str) -> None:
    trainer = make_trainer(tmp_path, "cuda", kind)
    for batch in (batch.pin_memory() for batch in batches):
        trainer._loss(batch, 7.0).backward()  # compiles kernels, and fills the allocator
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer._loss(batch, 7.0).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
