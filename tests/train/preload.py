# ruff: noqa: F401
"""What the processes of ranks.py find imported and made when they are forked."""

import gc

import torch.utils.tensorboard
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import oncelm.cli.train
import oncelm.train.trainer
import tests.train.parallel.cases

get_checkpoint_conversion_mapping("")  # a thousand regular expressions, made at the first model that is loaded
gc.freeze()  # nor is what stays looked at again whenever garbage is collected
