"""A cache that is handed to `generate` is used, whatever the configuration says about caches."""

from __future__ import annotations

import pytest
import torch

from tests.models.small import make_long, make_model

KINDS = {"retention": lambda: make_model("retention"), "window": lambda: make_model("window"), "longllama": make_long}


@pytest.mark.parametrize("kind", KINDS)
def test_generate_feeds_a_growing_cache_each_token_once(kind) -> None:
    model = KINDS[kind]().eval()
    ids = torch.randint(4, model.config.vocab_size, (1, 20))
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, **options)
    model.config.use_cache = model.generation_config.use_cache = False
    for max_tokens in (None, 40):
        cache = model.new_cache(1, max_tokens)
        assert model.generate(ids, past_key_values=cache, **options).equal(wanted)
        assert cache.num_tokens == 20 + 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_hides_what_a_cache_has_read_is_refused(kind) -> None:
    """Also where one token alone is new, whose mask no forward pass is given."""
    model = KINDS[kind]().eval()
    ids = torch.randint(4, model.config.vocab_size, (2, 12))
    for new in (1, 3):
        cache, mask = model.new_cache(2), torch.ones(2, 12, dtype=torch.long)
        model.prefill(ids[:, : 12 - new], cache)
        mask[1, 2] = 0
        with pytest.raises(ValueError, match="attention_mask hides tokens that the cache has taken in"):
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False)
