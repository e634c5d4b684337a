"""Every family's classifiers of whole texts and of tokens, as transformers' own models have them.

Where a family can, only the positions that a classifier needs are computed.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

from oncelm.cache.base import SequenceCache
from oncelm.models.base import BaseModel, Pass
from oncelm.models.extras import read_extras
from oncelm.models.inputs import IGNORE_INDEX
from oncelm.models.wanted import Wanted


class Classifier(BaseModel):
    """A base model with a head `score` of `config.num_labels` classes; a folder without one gets a new one."""

    head_names = ("score",)
    has_new_head = True
    has_bias = False
    accepts_loss_kwargs = False  # a batch's loss is a mean over its own labels; Trainer averages over batches

    def add_head(self, config: PreTrainedConfig) -> None:
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=self.has_bias)

    def _init_weights(self, module: nn.Module) -> None:
        if module is not self.score:
            super()._init_weights(module)
            return
        init.normal_(self.score.weight, std=0.02)
        if self.score.bias is not None:
            init.zeros_(self.score.bias)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SequenceCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores of classes and, with labels, their loss. Arguments are those of the family's causal language model,
        but:

        Args:
            labels: of texts [B] (numbers for `problem_type="regression"`, [B, num_labels] for several classes at once),
                or of tokens [B, T], -100 for none.
            use_cache: return a cache; None means False.

        Returns:
            `logits` of texts [B, num_labels], at the last token; or of tokens [B, T, num_labels], with labels zeros at
            those without one. `loss`, the mean over labels, and `hidden_states`.
        """
        own = self._take_own(kwargs)
        cu_seqlens, _ = read_extras(self, kwargs, cu_seqlens, None, output_attentions=output_attentions)
        given = self._read(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cu_seqlens, own,
            makes_cache=False,
        )  # fmt: skip
        positions = self._positions(given, input_ids if attention_mask is None else None, labels)
        wanted = Wanted(given.inputs, positions, everywhere=self._returns_hidden_states(output_hidden_states))
        with torch.set_grad_enabled(torch.is_grad_enabled() and given.cache is None):
            _, layers = self._run(given, wanted)
            hidden = wanted.hidden()
            assert hidden is not None
            output = self._answer(self.score(hidden), positions, labels, given, layers)
        return self._output(output, return_dict)

    def _positions(
        self, given: Pass, unmasked_ids: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor | None:
        """[B, T] booleans: whose scores are wanted; None: of all.

        unmasked_ids: the ids where nobody said which are padding.
        """
        raise NotImplementedError

    def _answer(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor | None,
        labels: torch.Tensor | None,
        given: Pass,
        layers: tuple[torch.Tensor, ...] | None,
    ) -> Any:
        """What `forward` returns, of the scores [M, num_labels] at these positions (None: [B, T, num_labels])."""
        raise NotImplementedError


class SequenceClassifier(Classifier):
    """Sorts texts, by the hidden state of each one's last token.

    As in transformers, that is the last one that is not `config.pad_token_id` where no attention mask is given. Of
    packed sequences it is the last token of each.
    """

    auto_model = AutoModelForSequenceClassification

    def _positions(
        self, given: Pass, unmasked_ids: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor | None:
        inputs, padding = given.inputs, self.config.pad_token_id
        positions = torch.zeros(inputs.shape, dtype=torch.bool, device=given.tokens.device)
        if inputs.real is None and inputs.batch.cu_seqlens is not None:
            if 0 in inputs.batch.lengths:
                raise ValueError("cu_seqlens packs an empty sequence: there is no token to sort it by.")
            positions[0, [end - 1 for end in accumulate(inputs.batch.lengths)]] = True
            return positions
        if inputs.real is not None and 0 in inputs.batch.lengths:
            raise ValueError(
                f"attention_mask hides all of text {inputs.batch.lengths.index(0)}: there is no last token."
            )
        last = inputs.last_columns()
        if unmasked_ids is not None and padding is None and len(unmasked_ids) > 1:
            raise ValueError(
                f"which tokens of {len(unmasked_ids)} texts are padding? config.pad_token_id is None: give an "
                "attention_mask, or set it."
            )
        if unmasked_ids is not None and padding is not None:
            columns = torch.arange(inputs.columns, device=last.device)
            last = (columns * (unmasked_ids.to(last.device) != padding)).argmax(1)
        return positions.scatter(1, last[:, None], True)

    def _answer(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor | None,
        labels: torch.Tensor | None,
        given: Pass,
        layers: tuple[torch.Tensor, ...] | None,
    ) -> SequenceClassifierOutputWithPast:
        loss = None
        if labels is not None:
            if len(labels) != len(scores) or labels.numel() not in (len(scores), scores.numel()):
                each = f" or {list(scores.shape)}" if scores.shape[1] > 1 else ""
                raise ValueError(f"labels must be one a text, [{len(scores)}]{each}, got {list(labels.shape)}.")
            loss = self.loss_function(labels=labels, pooled_logits=scores, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=scores, past_key_values=given.cache, hidden_states=layers
        )


class TokenClassifier(Classifier):
    """Sorts tokens, by the hidden state of each."""

    auto_model = AutoModelForTokenClassification
    has_bias = True

    def _positions(
        self, given: Pass, unmasked_ids: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor | None:
        if labels is None:
            return None
        if labels.shape != given.inputs.shape:
            raise ValueError(f"labels must be [B, T] = {list(given.inputs.shape)}, got {list(labels.shape)}.")
        has_label = labels.to(given.tokens.device) != IGNORE_INDEX
        return has_label if given.inputs.real is None else has_label & given.inputs.real

    def _answer(
        self,
        scores: torch.Tensor,
        positions: torch.Tensor | None,
        labels: torch.Tensor | None,
        given: Pass,
        layers: tuple[torch.Tensor, ...] | None,
    ) -> TokenClassifierOutput:
        if labels is None or positions is None:
            return TokenClassifierOutput(logits=scores, hidden_states=layers)
        # no label at all is a loss of 0, as of a causal language model, and not nan
        targets = labels.to(scores.device)[positions]
        loss = self.loss_function(scores, targets, self.config) if len(targets) else scores.sum()
        logits = scores.new_zeros(*positions.shape, scores.shape[-1]).index_put((positions,), scores)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=layers)
