"""Conversations for supervised fine-tuning: JSONL to packed rows whose targets are the assistant's tokens.

    file:line -> messages -> tokens, and which of them the assistant wrote -> rows [T] of whole conversations

A line is one JSON object, in any of these forms (`read_messages`):

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}
    {"prompt": ..., "response": ...}        also prompt/answer, prompt/completion, question/answer,
                                            instruction(/input)/output

Conversations are written by the tokenizer's chat template; where it has none, plainly:

    "User:\\n" + text + "\\n\\n"        "System:\\n" + text + "\\n\\n"        "Assistant:\\n" + text + eos

The answer and the eos are targets, and nothing else.
"""

from __future__ import annotations

import bisect
import codecs
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from oncelm.data.sampler import permute

logger = logging.getLogger(__name__)

IGNORED = -100  # Hugging Face's mark of a target that does not count
ROLES = ("system", "user", "assistant")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
)
_SHAREGPT = {"human": "user", "gpt": "assistant"}  # names of ShareGPT's "from"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Conversation:
    """Tokens [n] of any unsigned type, and which of them the assistant wrote, [n] booleans; `where` is file:line."""

    tokens: np.ndarray
    answer: np.ndarray
    where: str


def conversation_files(path: str | os.PathLike[str]) -> list[Path]:
    """The .jsonl files of a folder, sorted, or a file itself."""
    given = Path(path)
    if not given.exists():
        raise FileNotFoundError(f"no conversations at {given}.")
    files = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
    if not files:
        raise ValueError(f"{given} holds no .jsonl file of conversations.")
    return files


def read_conversations(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Conversation]:
    """All conversations of a file or folder, cut to `max_tokens`, with a warning; left out where no answer remains.

    Raises:
        ValueError: a line that is no conversation, as file:line and the reason; none at all.
    """
    found: list[Conversation] = []
    cut = lost = 0
    for file in conversation_files(path):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    tokens, answer = encode(read_messages(line), tokenizer)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                cut += len(tokens) > max_tokens
                conversation = Conversation(tokens[:max_tokens], answer[:max_tokens], where)
                if conversation.answer[1:].any():
                    found.append(conversation)
                else:
                    lost += 1
    if cut or lost:
        logger.warning(
            "%d conversations are longer than seq_len=%d tokens and are cut; %d are left out: no answer remains",
            *(cut, max_tokens, lost),
        )
    if not found:
        raise ValueError(f"{path} holds no conversation with an answer in its first {max_tokens} tokens.")
    return found


def read_messages(line: bytes) -> Messages:
    """The messages of one line; ValueError says what is wrong with it."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, got {type(record).__name__}")
    if "messages" in record:
        messages = _messages(record["messages"], "messages", "role", "content")
    elif "conversations" in record:
        messages = _messages(record["conversations"], "conversations", "from", "value")
    else:
        messages = _pair(record)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of the assistant: there would be nothing to learn")
    return messages


def _messages(listed: Any, field: str, role_key: str, text_key: str) -> Messages:
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{field} must be a list of messages, got {listed!r:.60}")
    messages = []
    for number, message in enumerate(listed):
        name = f"{field}[{number}]"
        if not isinstance(message, dict) or not {role_key, text_key} <= message.keys():
            raise ValueError(f"{name} must have {role_key} and {text_key}, got {message!r:.60}")
        role = message[role_key]
        role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"{name} has {role_key} {role!r}; allowed: {', '.join(ROLES)}")
        messages.append({"role": role, "content": _text(message[text_key], f"{name}.{text_key}")})
    return messages


def _pair(record: dict[str, Any]) -> Messages:
    for question, answer in PAIRS:
        if question in record and answer in record:
            asked = _text(record[question], question)
            if question == "instruction" and record.get("input"):
                asked += "\n\n" + _text(record["input"], "input")
            told = _text(record[answer], answer)
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    forms = ", ".join(f"{question} and {answer}" for question, answer in PAIRS)
    raise ValueError(f"neither messages nor conversations nor {forms} among its keys ({', '.join(record)[:60]})")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text that is not empty, got {value!r:.60}")
    return value


def encode(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's tokens, uint32 [n], and which of them the assistant wrote, [n] booleans.

    Raises:
        ValueError: the tokenizer's chat template refuses the conversation, or does not show what the assistant wrote.
    """
    try:
        if tokenizer.chat_template is None:
            tokens, answer = _encode_plainly(messages, tokenizer)
        elif "generation" in str(tokenizer.chat_template).replace("add_generation_prompt", ""):
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            tokens, answer = encoded["input_ids"], encoded["assistant_masks"]
        else:
            tokens, answer = _encode_by_turns(messages, tokenizer)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template does not take this conversation: {error}") from None
    return np.array(tokens, dtype=np.uint32), np.array(answer, dtype=bool)


def _encode_plainly(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    tokens: list[int] = []
    answer: list[bool] = []
    for message in messages:
        name, is_answer = f"{message['role'].capitalize()}:\n", message["role"] == "assistant"
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        head, text = (tokenizer.encode(part, add_special_tokens=False) for part in (name, message["content"]))
        text += end if is_answer else tokenizer.encode("\n\n", add_special_tokens=False)
        tokens += head + text
        answer += [False] * len(head) + [is_answer] * len(text)
    return tokens, answer


def _encode_by_turns(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """By a template that does not mark the assistant's part: what each answer adds to the conversation before it."""
    tokens = _apply(tokenizer, messages)
    answer = [False] * len(tokens)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _apply(tokenizer, messages[:number], add_generation_prompt=True)
            after = _apply(tokenizer, messages[: number + 1])
            if tokens[: len(after)] != after or after[: len(before)] != before:
                raise ValueError(
                    "the tokenizer's chat template writes a conversation's beginning differently when more follows; "
                    "mark the assistant's part in it with {% generation %} ... {% endgeneration %}"
                )
            answer[len(before) : len(after)] = [True] * (len(after) - len(before))
    return tokens, answer


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=True)
    return list(encoded["input_ids"])


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which items share a row of `size`: each into the fullest row that has room, the longest first ("best fit")."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row that is not full, ascending: (tokens left, row)
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[item], -1))
        left, row = room.pop(place) if place < len(room) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        if left > lengths[item]:
            bisect.insort(room, (left - lengths[item], row))
    return rows


class ConversationDataset:
    """Rows of whole conversations: a pure function of (seed, step), as `TokenDataset`'s.

    Rows are packed once and shuffled anew in every epoch. What remains of a row is padding, a sequence of its own
    without targets. Conversations attend to themselves only (`cu_seqlens`).

    Args:
        conversations: held in memory, 5 bytes a token.
        seq_len: tokens in a row; at least as many as the longest conversation.
        pad_id: what rows are filled up with.
        validation_share: of the conversations, from their end, that are held out.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        seq_len: int,
        *,
        pad_id: int = 0,
        seed: int = 0,
        validation_share: float = 0.05,
    ) -> None:
        num_train = len(conversations) - int(np.ceil(validation_share * len(conversations)))
        if num_train < 1:
            raise ValueError(f"{len(conversations)} conversation(s) are too few to hold {validation_share:.0%} out.")
        self.conversations, self.seq_len, self.pad_id, self.seed = conversations, seq_len, pad_id, seed
        lengths = [len(conversation.tokens) for conversation in conversations]
        self._train = pack(lengths[:num_train], seq_len)
        self._valid = [[num_train + item for item in row] for row in pack(lengths[num_train:], seq_len)]

    @property
    def largest_id(self) -> int:
        return max(int(conversation.tokens.max()) for conversation in self.conversations)

    def batch(self, step: int, batch_size: int, rows: slice | None = None) -> torch.Tensor:
        """int64 [B, T]: those rows of the step's batch."""
        return self._fill(self._rows(step, batch_size, rows), self.pad_id, lambda conversation: conversation.tokens)

    def labels(self, step: int, batch_size: int, rows: slice | None = None) -> torch.Tensor:
        """int64 [B, T] beside `batch`: the assistant's tokens, -100 elsewhere and at a conversation's first token."""
        return self._fill(self._rows(step, batch_size, rows), IGNORED, _labels)

    def cu_seqlens(self, step: int, batch_size: int, rows: slice | None = None) -> torch.Tensor:
        """int32 [N + 1]: borders of conversations, and of padding, in `batch(...).view(1, -1)`."""
        return self._borders(self._rows(step, batch_size, rows))

    def validation_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        for index in range(-(-len(self._valid) // batch_size)):
            rows = self._valid_rows(index, batch_size)
            yield self._fill(rows, self.pad_id, lambda conversation: conversation.tokens)

    def validation_labels(self, index: int, batch_size: int) -> torch.Tensor:
        return self._fill(self._valid_rows(index, batch_size), IGNORED, _labels)

    def validation_cu_seqlens(self, index: int, batch_size: int) -> torch.Tensor:
        return self._borders(self._valid_rows(index, batch_size))

    def describe(self, k: int) -> str:
        """The lines that row k of the run is made of."""
        return ", ".join(self.conversations[item].where for item in self._row(k))

    def _row(self, k: int) -> list[int]:
        epoch, index = divmod(k, len(self._train))
        return self._train[permute(index, len(self._train), self.seed, "conversations", epoch)]

    def _rows(self, step: int, batch_size: int, rows: slice | None) -> list[list[int]]:
        return [self._row(step * batch_size + row) for row in range(batch_size)[rows or slice(None)]]

    def _valid_rows(self, index: int, batch_size: int) -> list[list[int]]:
        return self._valid[index * batch_size : (index + 1) * batch_size]

    def _fill(
        self, rows: Sequence[Sequence[int]], filler: int, values: Callable[[Conversation], np.ndarray]
    ) -> torch.Tensor:
        filled = np.full((len(rows), self.seq_len), filler, dtype=np.int64)
        for out, items in zip(filled, rows, strict=True):
            joined = np.concatenate([values(self.conversations[item]) for item in items])
            out[: len(joined)] = joined
        return torch.from_numpy(filled)

    def _borders(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        borders = [0]
        for number, items in enumerate(rows):
            start = number * self.seq_len
            ends = start + np.cumsum([len(self.conversations[item].tokens) for item in items])
            borders += [int(end) for end in ends]
            if borders[-1] < start + self.seq_len:
                borders.append(start + self.seq_len)
        return torch.tensor(borders, dtype=torch.int32)


def _labels(conversation: Conversation) -> np.ndarray:
    labels = np.where(conversation.answer, conversation.tokens.astype(np.int64), IGNORED)
    labels[0] = IGNORED
    return labels
