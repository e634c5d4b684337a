"""GGUF files (llama.cpp's format) of LLaMA-family models, read into a Hugging Face model and tokenizer.

Read here and not by transformers, which drops what it does not know without a word (RoPE scaling, biases, the cut of
words), each version something else. Whatever a file says is honoured or refused by name:

    header.py      the metadata and the table of tensors, checked against the size of the file
    config.py      the model's configuration from the metadata
    rope.py        its RoPE
    weights.py     the tensors, by name and shape, as weights
    tokenizer.py   the tokenizer
    cuts.py        how text is cut into words before merges, by the names that files use
"""

from oncelm.models.gguf.read import is_gguf, read_gguf, read_gguf_config, read_gguf_tokenizer

__all__ = ["is_gguf", "read_gguf", "read_gguf_config", "read_gguf_tokenizer"]
