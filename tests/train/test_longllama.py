"""LongLLaMA in the trainer."""

from __future__ import annotations

import numpy as np

from oncelm.data.crossbatch import DocumentBatches
from oncelm.train.config import TrainConfig
from oncelm.train.trainer import Trainer
from tests.models.small import VOCAB, make_long


def test_the_trainer_trains_a_longllama_with_crossbatch(tmp_path) -> None:
    """The configuration says how; the trainer needs to know nothing."""
    rng = np.random.default_rng(0)
    documents = [np.resize(rng.integers(1, VOCAB, 7), 400) for _ in range(6)]
    data = DocumentBatches(documents, 13, packing=4, held_out=1)
    model = make_long(cross_batch_range=3, cross_batch_stepping=True, dataset_packing=4)
    config = TrainConfig(
        data="-", out=str(tmp_path), steps=30, batch_size=8, grad_accumulation=2, seq_len=13, lr=3e-3, device="cpu",
        warmup_steps=2, log_every=1, eval_every=None, save_every=None,
    )  # fmt: skip
    result = Trainer(model, data, config).fit()
    assert result.loss is not None
    assert result.loss < 3.5 < np.log(VOCAB)
    assert result.validation_loss is not None
