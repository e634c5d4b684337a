"""torch's AdamW; or its Muon for the matrices of the layers, and AdamW for all else."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

from oncelm.train.config import TrainConfig


def build_optimizers(model: PreTrainedModel, config: TrainConfig) -> list[Optimizer]:
    """Optimizers of all trainable parameters; embeddings, norms and biases are not decayed.

    "muon" orthogonalises the update of every matrix but embeddings and the output projection, and scales it to the
    size of AdamW's (arXiv 2502.16982), so that one learning rate and one decay serve both.

    Raises:
        ValueError: nothing to train.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter to train: requires_grad is off for all of them.")
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        head = id(model.get_output_embeddings().weight)
        hidden = [p for p in decayed if p.ndim == 2 and id(p) != head]
        decayed = [p for p in decayed if p.ndim != 2 or id(p) == head]
        optimizers.append(
            Muon(
                hidden,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups: list[dict[str, Any]]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    adamw = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    return [*optimizers, adamw]
