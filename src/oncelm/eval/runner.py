"""Ask a model the examples of a task, and keep a line of JSON a sample in a file that a later run continues."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from oncelm.utils.files import atomic_file


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        key: what tells it from the others of its task (lengths, depths, seed): plain JSON values.
        ids: the prompt's tokens.
        answer: what is right.
        max_new_tokens: tokens that the model may write.
    """

    key: dict[str, Any]
    ids: list[int]
    answer: str
    max_new_tokens: int


@dataclass(frozen=True)
class Reader:
    """A model that reads a prompt of any length and writes greedily.

    Attributes:
        cache_options: for `model.new_cache` (LongLLaMA: memory="cpu", ...).
        read_options: for `model.prefill` (LongLLaMA: last_context_length; YOCO: chunk_size).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cache_options: dict[str, Any] = field(default_factory=dict)
    read_options: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def answer(self, example: Example) -> str:
        """The continuation of an example's prompt, as text."""
        ids = torch.tensor([example.ids], device=self.model.device)
        options: dict[str, Any] = {}
        if hasattr(self.model, "prefill"):  # other models read the prompt within generate
            cache = self.model.new_cache(1, ids.shape[1] + example.max_new_tokens, **self.cache_options)
            if ids.shape[1] > 1:
                self.model.prefill(ids[:, :-1], cache, **self.read_options)
            options["past_key_values"] = cache
        plan = GenerationConfig(
            max_new_tokens=example.max_new_tokens,
            do_sample=False,
            eos_token_id=self.model.config.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        mask = torch.ones_like(ids)
        out = self.model.generate(ids, attention_mask=mask, generation_config=plan, **options)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def evaluate(
    reader: Reader,
    examples: Iterable[Example],
    score: Callable[[Example, str], bool],
    settings: dict[str, Any],
    out: str | os.PathLike[str],
) -> Iterator[dict[str, Any]]:
    """Ask every example that `out` has no line of yet; yields the lines of all, old ones too, in the order of examples.

    Args:
        settings: what the answers depend on beside the example (model, memory, ...); every line says it.
        out: a .jsonl file; each line is on the disk before the next sample starts.

    Raises:
        ValueError: `out` holds results of other settings, or is no file of results.
    """
    file = Path(out)
    done = {json.dumps(line["key"], sort_keys=True): line for line in read_results(file, settings)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        for example in examples:
            name = json.dumps(example.key, sort_keys=True)
            if name not in done:
                started = time.perf_counter()
                output = reader.answer(example)
                done[name] = {
                    "settings": settings,
                    "key": example.key,
                    "tokens": len(example.ids),
                    "answer": example.answer,
                    "output": output,
                    "correct": score(example, output),
                    "seconds": round(time.perf_counter() - started, 3),
                }
                stream.write(json.dumps(done[name], ensure_ascii=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            yield done[name]


def read_results(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of an earlier run; a last line that was cut short by a crash is taken out of the file."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole, newline, rest = text.rpartition("\n")
    if rest:  # a line is written with its end
        with atomic_file(file) as temporary:
            temporary.write_text(whole + newline, encoding="utf-8")
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            result = json.loads(line)
            found = result["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}, is no result of an evaluation; name another file.") from error
        if found != settings:
            differs = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
            raise ValueError(
                f"{file} holds results of another run: {', '.join(differs)} "
                f"{'was' if len(differs) == 1 else 'were'} different; name another file."
            )
        lines.append(result)
    return lines
