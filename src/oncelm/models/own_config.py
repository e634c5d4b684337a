"""What the configurations of all families share: their own keys are checked, keys of other tools are kept."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig

from oncelm.utils.constraints import Constraint, Each, Flag, Keyed, OneOf, Only, Text, Whole, constraints_of
from oncelm.utils.device import DTYPES
from oncelm.utils.errors import nearest, shown, unknown

logger = logging.getLogger(__name__)

# What transformers itself passes to a config, beside the fields: not a user's keys.
TRANSFORMERS_KEYS = {
    "_attn_implementation", "_commit_hash", "_experts_implementation", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "quantization_config", "torch_dtype", "transformers_version",
    *GenerationConfig._get_default_generation_params(),
}  # fmt: skip
# Keys of other models that only look like ours with an error in writing.
OTHERS_KEYS = {
    *("cls_token_id", "mask_token_id", "sep_token_id", "unk_token_id", "bos_token", "eos_token", "pad_token"),
    "type_vocab_size",
}
MISSPELT = 0.75  # likeness from which a key is one of ours, misspelt


class Dtype(Constraint):
    """A dtype that models compute in, or its name."""

    optional = True

    def check(self, name: str, value: Any) -> Any:
        known = isinstance(value, str) and value in DTYPES
        if not known and not (isinstance(value, torch.dtype) and value in DTYPES.values()):
            raise unknown(name, str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value, DTYPES)
        return value


class Quantization(Constraint):
    """What transformers reads: a dictionary, or an object such as its BitsAndBytesConfig."""

    optional = True

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, Mapping) and not hasattr(value, "to_dict"):
            raise self.refuse(name, value)
        return value

    def describe(self) -> str:
        return "a dictionary or a configuration of transformers"


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# transformers' own fields; some of them would be swallowed by models that have no such thing
COMMON: dict[str, Constraint] = {
    "dtype": Dtype(),
    "output_hidden_states": Flag(optional=True),
    **dict.fromkeys(
        ("output_attentions", "_output_attentions"), Only(False, "OnceLM's models return no attention weights")
    ),
    "chunk_size_feed_forward": Only(0, "OnceLM's models compute feed-forward layers at once"),
    "is_encoder_decoder": Only(False, "OnceLM's models are decoders"),
    "return_dict": Flag(optional=True),
    "num_labels": Whole(0, 2**20),
    "id2label": Keyed(any_keys=True, optional=True),
    "label2id": Keyed(any_keys=True, optional=True),
    "per_layer_config": Only({}, "the layers of OnceLM's models are alike"),
    "quantization_config": Quantization(),
    "problem_type": OneOf(PROBLEM_TYPES, optional=True),
    "architectures": Each(Text(), optional=True),
    "transformers_version": Text(optional=True),
}


class OwnConfig(PreTrainedConfig):
    """A configuration that is checked whenever a key is set. Subclasses are decorated with `checked`.

    Each has `vocab_size`, `hidden_size`, `num_hidden_layers`, `max_position_embeddings`, `tie_word_embeddings` and
    `use_cache`.
    """

    constraints: ClassVar[dict[str, Constraint]] = {}
    older_keys: ClassVar[frozenset[str]] = frozenset()  # of earlier versions, which __post_init__ translates

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys that the class describes."""
        common = {entry.name for entry in dataclasses.fields(PreTrainedConfig)}
        return [entry.name for entry in dataclasses.fields(cls) if entry.name not in common]

    @staticmethod
    def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """Keys of such a configuration with changes, without those whose place a change takes."""
        return {**settings, **changes}

    def stated_keys(self) -> list[str]:
        """Those of them that say what the model is, without what follows from others."""
        return self.own_keys()

    @classmethod
    def completed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """The given keys, and what follows from them instead of a default."""
        return settings

    def _refuse_unknown(self, keys: Mapping[str, Any]) -> None:
        for key in keys:
            if key not in TRANSFORMERS_KEYS | self.older_keys:
                raise unknown(f"{type(self).__name__} key", key, self.own_keys())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Hugging Face, but keys given beside the dict are checked too, and what other tools left in it is kept.

        Raises:
            ValueError: a key that looks like one of `own_keys`, misspelt, or is a name that the class itself uses.
        """
        known = {entry.name for entry in dataclasses.fields(cls)} | TRANSFORMERS_KEYS | cls.older_keys
        given = {key: kwargs.pop(key) for key in cls.own_keys() if key in kwargs}
        others = {key: value for key, value in config_dict.items() if key not in known}
        for key, value in {**others, **kwargs}.items():
            near = nearest(key, cls.own_keys(), MISSPELT)
            if near and value is not None and key not in known | OTHERS_KEYS:
                raise unknown(f"{cls.__name__} key", key, cls.own_keys())
        settings = {key: value for key, value in config_dict.items() if key not in others}
        made = super().from_dict({**settings, **given}, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config._keep(others)
        return made

    def _keep(self, others: dict[str, Any]) -> None:
        """Set the keys of other tools, with one warning, so that `save_pretrained` writes them again."""
        kept = []
        for key, value in others.items():
            if not hasattr(type(self), key):
                setattr(self, key, value)
                kept.append(key)
            elif value is not None and getattr(self, key) != value:  # such as num_hidden_layers of a YOCO
                own = getattr(self, key)
                instead = "the class itself uses that name" if callable(own) else f"the other keys say {shown(own)}"
                raise ValueError(f"{type(self).__name__} cannot have a key {key!r} of {shown(value)}: {instead}.")
        if kept:
            where = self.name_or_path or type(self).__name__
            logger.warning("%s: keys that OnceLM does not use, kept as they are: %s", where, ", ".join(kept))


def checked(cls: Any) -> Any:
    """A decorator, above `strict`: whatever is set, when the configuration is made or later, fits its constraint."""
    constraints = {**COMMON, **cls.constraints, **constraints_of(cls)}
    assign, make = cls.__setattr__, cls.__init__

    def set_checked(self: Any, name: str, value: Any) -> None:
        assign(self, name, constraints[name](name.lstrip("_"), value) if name in constraints else value)

    @functools.wraps(make)
    def make_checked(self: Any, **kwargs: Any) -> None:
        try:
            make(self, **cls.completed(kwargs))
        except (StrictDataclassError, KeyError) as error:  # transformers' own checks, of rope_parameters among others
            raise ValueError(f"{cls.__name__}: {' '.join(str(error).split())}") from error

    cls.constraints = constraints
    cls.__setattr__, cls.__init__ = set_checked, make_checked
    return cls
