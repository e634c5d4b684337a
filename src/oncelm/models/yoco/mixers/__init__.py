"""The mixers of the self-decoder: what lets the tokens of a layer meet. One file each; docs/add-a-mixer.md adds one."""

from oncelm.models.yoco.mixers.base import Mixer, MixerWork, Room
from oncelm.models.yoco.mixers.registry import find_mixer, mixer_names, mixers_of, register_mixer

__all__ = ["Mixer", "MixerWork", "Room", "find_mixer", "mixer_names", "mixers_of", "register_mixer"]
