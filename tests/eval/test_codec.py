"""Text to ids and back, special tokens apart."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oncelm import load_tokenizer
from oncelm.eval import Codec


def test_codec() -> None:
    codec = Codec(load_tokenizer("bytes"), 260)
    assert codec.decode(codec.encode("h\u00e9, <s>")) == "h\u00e9, <s>"
    before, after = codec.pair("Answer:", " yes")
    assert (codec.decode(before), codec.decode(after)) == ("Answer:", " yes")
    assert codec.prefix.tolist() == []
    with_bos = load_tokenizer("bytes")
    with_bos.add_bos_token = True
    assert Codec(with_bos).prefix.tolist() == [0]
    text = "".join(f"line {i}\n" for i in range(150_000))
    pieces = list(codec.stream([text]))
    assert len(pieces) > 1
    assert codec.decode(np.concatenate(pieces)) == text
    with pytest.raises(ValueError, match="gives token 119, but the model knows 100 tokens"):
        Codec(load_tokenizer("bytes"), 100).encode("sss")


def test_a_tokenizer_that_loses_text_is_told() -> None:
    poor = Tokenizer(BPE({"a": 0, "?": 1}, [], unk_token="?"))
    poor.decoder = decoders.Fuse()
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=poor, unk_token="?"))
    with pytest.raises(ValueError, match="cannot encode the needle: 'abc' comes back as"):
        codec.check("abc", "the needle")
