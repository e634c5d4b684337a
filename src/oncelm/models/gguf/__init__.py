"""GGUF files (llama.cpp's format) of LLaMA-family models, read into a Hugging Face model and tokenizer.

transformers' reader is not used: it silently drops what it does not know (RoPE scaling, biases, pre-tokenizers), each
version something else. Here everything in a file is used, or refused by name:

    header.py      the metadata and the table of tensors, checked against the size of the file
    config.py      the model's configuration from the metadata
    rope.py        its RoPE
    weights.py     the tensors, by name and shape, as weights
    tokenizer.py   the tokenizer
    cuts.py        how text is cut into words before merges, by the names that files use
"""

from oncelm.models.gguf.read import is_gguf, read_gguf, read_gguf_config, read_gguf_tokenizer

__all__ = ["is_gguf", "read_gguf", "read_gguf_config", "read_gguf_tokenizer"]
