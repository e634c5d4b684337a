"""Settings of a run with LongLLaMA's crossbatch (arXiv 2307.03170): checks, and which rows each row sees."""

from __future__ import annotations

from transformers import PreTrainedConfig

from oncelm.models.registry import family, titles
from oncelm.ops.crossbatch import earlier_contexts
from oncelm.train.config import TrainConfig


def check_crossbatch(config: TrainConfig, model: PreTrainedConfig) -> None:
    """ValueError unless the data's rows and the model's crossbatch fit each other."""
    has_crossbatch = family(model).has_crossbatch
    if config.crossbatch_rows is None:
        if has_crossbatch and model.cross_batch_range:
            raise ValueError(
                f"this {family(model).title} trains with crossbatch (cross_batch_range {model.cross_batch_range}): set "
                f"crossbatch_rows, those that hold one piece of a document (it had {model.dataset_packing}), or "
                "model_overrides.cross_batch_range=0 to train without."
            )
        return
    if not (has_crossbatch and model.mem_layers):
        hint = "name layers of a LLaMA-family model with model_overrides.mem_layers=[...]"
        those = titles(lambda one: one.has_crossbatch)
        raise ValueError(f"crossbatch_rows is for {those} models; {config.model!r} has no memory layers: {hint}.")
    if not model.cross_batch_range:
        raise ValueError(
            "crossbatch_rows needs model_overrides.cross_batch_range: how many rows before it a row sees at most "
            "(the paper: 3, with crossbatch_rows 4 and cross_batch_stepping)."
        )
    if config.seq_len > model.max_position_embeddings:
        raise ValueError(
            "with crossbatch_rows a row is one window, of at most max_position_embeddings = "
            f"{model.max_position_embeddings} tokens; got seq_len {config.seq_len}."
        )


def describe_crossbatch(config: TrainConfig, model: PreTrainedConfig) -> list[tuple[str, str]]:
    """Lines of a plan: what a row of the last piece of a document in a forward pass sees."""
    assert config.crossbatch_rows is not None
    assert model.cross_batch_range
    k = config.crossbatch_rows
    counts = earlier_contexts(config.batch_size, model.cross_batch_range, model.cross_batch_stepping, k)[-k:]
    seen = [(min(count, row), max(count - row, 0)) for row, count in enumerate(counts)]
    layers = ", ".join(map(str, model.mem_layers))
    return [
        ("memory layers", f"{layers} (of {model.num_hidden_layers}, from 0)"),
        ("crossbatch", f"{k} rows of {config.seq_len:,} tokens from one piece of a document"),
        ("  rows seen", "(positives, negatives) " + " ".join(f"({own},{other})" for own, other in seen)),
    ]
