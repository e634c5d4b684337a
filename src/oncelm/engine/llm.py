"""The engine as a Python object: prompts in, answers out."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oncelm.data.chats import read_messages
from oncelm.data.templates import encode_question
from oncelm.data.tokenizers import load_tokenizer
from oncelm.engine.beam import BeamSearchParams, beam_search
from oncelm.engine.intake import Prompt
from oncelm.engine.metrics import MetricsReport
from oncelm.engine.options import engine_options
from oncelm.engine.outputs import RequestOutput
from oncelm.engine.params import SamplingParams, as_params
from oncelm.engine.single import make_engine
from oncelm.engine.thread import EngineStopped, Newest
from oncelm.models.load import load, read_config, set_execution
from oncelm.models.registry import presets
from oncelm.utils.errors import shown


class LLM:
    """A model that answers many requests at once; names are vLLM's where the idea is the same.

        with LLM("path/to/model") as llm:
            for output in llm.generate(["Once", "It was"], SamplingParams(max_tokens=100)):
                print(output.outputs[0].text)

    Args:
        model: a folder or hub id (as `oncelm.load` takes it), or a model, which is used as it is.
        tokenizer: its name or folder, or itself; None: that of the model's folder, or none where a model is given.
        device, dtype: of a model that is loaded.
        quantization: "float8" reads prompts in float8 (`YocoModel.set_quantization`).
        compile: compile the layers.
        options: how requests are run: those of `EngineOptions` (engine/options.py).

    Several threads may use one `LLM`: whoever waits for an answer runs the next step, of everybody's requests.

    Attributes:
        engine: what runs them.

    Raises:
        ValueError: an unknown option or value, or too little memory for a request, with what would fit.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        compile: bool = False,
        **options: Any,
    ) -> None:
        settings = engine_options(options)
        _check_kinds(model, tokenizer)
        if isinstance(model, PreTrainedModel):
            if device is not None or dtype is not None:
                raise ValueError("device and dtype are for a model that is loaded; the one given has its own.")
            if quantization is not None or compile:
                set_execution(model, "the model given", compile, quantization)
        else:
            if tokenizer is None:
                tokenizer = _tokenizer_of(model)
            model = load(model, device, dtype, compile=compile, quantization=quantization)
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = load_tokenizer(tokenizer)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.engine = make_engine(model, tokenizer, settings)
        self._numbers = itertools.count()
        self._open: set[str] = set()  # requests that somebody waits for
        self._news: dict[str, RequestOutput] = {}  # theirs that have changed
        self._is_stepping = False
        self._left: list[str] = []  # requests that are to be aborted behind the step that runs
        self._lock = threading.RLock()  # of the engine and of these: one thread at a time

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """The answers to prompts, in their order.

        Args:
            prompts: text, token ids, {"prompt_token_ids": ids}, or a list of these.
            sampling_params: one for all, or one for each.
            use_tqdm: show progress.
            priority: one for all, or one for each; smaller ones come first.
            cache_salt: what was read is shared among requests of the same salt only.

        Raises:
            ValueError: a prompt that cannot be run; none is run then.
        """
        several = _several(prompts)
        params = _one_each("sampling_params", sampling_params, len(several))
        priorities = _one_each("priority", priority, len(several))
        ids: list[str] = []
        outputs = {}
        try:
            for prompt, one, urgency in zip(several, params, priorities, strict=True):
                ids.append(self._begin())
                with self._lock:
                    self.engine.add_request(ids[-1], prompt, one, priority=urgency, cache_salt=cache_salt)
            with _Progress(len(ids), disable=not use_tqdm) as progress:
                for output in self._outputs(ids):
                    if output.finished:
                        outputs[output.request_id] = output
                        progress.finish(output)
        finally:
            self._end(ids)
        return [outputs[request_id] for request_id in ids]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Iterator[RequestOutput]:
        """The answer to a prompt, as it comes: as far as it has come, or what is new (`output_kind`).

        The request begins with the first output, and ends where the iterator is closed.
        """
        params = as_params(sampling_params)
        request_id, earlier = self._begin(), None
        try:
            with self._lock:
                self.engine.add_request(request_id, prompt, params, priority=priority, cache_salt=cache_salt)
            for output in self._outputs([request_id]):
                with self._lock:  # no step writes to it meanwhile
                    newest = Newest(output)
                if newest.finished or params.output_kind != "final_only":
                    yield newest.read(since=earlier if params.output_kind == "delta" else None)
                    earlier = newest
                if newest.finished:
                    break
        finally:
            self._end([request_id])

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """The answers to one or several conversations, by the tokenizer's chat template.

        Args:
            messages: [{"role": "user", "content": "..."}, ...], or a list of such lists.
            tools: that the template is told of.
            options: of `generate`.
        """
        if self.tokenizer is None:
            raise ValueError("a conversation needs a tokenizer; this engine has none.")
        several: Any = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        chats = [read_messages(one, tools) for one in several]
        prompts = [{"prompt_token_ids": encode_question(chat, self.tokenizer)} for chat in chats]
        return self.generate(prompts, sampling_params, **options)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams | None = None
    ) -> list[RequestOutput]:
        """The likeliest answers to prompts, as `model.generate(num_beams=...)` finds them (`engine.beam`)."""
        return beam_search(self, prompts, params)

    def read(
        self,
        document: Prompt,
        progress: Callable[[int], object] | None = None,
        *,
        cache_salt: str | None = None,
    ) -> int:
        """Read a text into the prefix cache, up to its end: prompts that begin with it go on from there.

        A question is best given as token ids behind those of the document, since tokenizers may join the end of one
        text with the beginning of the next (then the last few tokens are read again).

        Args:
            progress: told now and then how many tokens are read.

        Returns:
            the number of tokens.

        Raises:
            ValueError: there is no prefix cache, or the document does not fit.
            MemoryError: memory ran out while it was read.
            EngineStopped: the engine was closed before it was read.
        """
        request_id = self._begin()
        try:
            with self._lock:
                output = self.engine.add_document(request_id, document, cache_salt=cache_salt)
            length = len(output.prompt_token_ids)
            while not output.finished:
                with self._lock:
                    if not output.finished:
                        self._step()
                if progress is not None:
                    progress(length if output.finished else self.engine.num_read(request_id))
        finally:
            self._end([request_id])
        if output.outputs[0].finish_reason == "abort":
            raise EngineStopped("the engine was closed before the document was read.")
        if output.outputs[0].error is not None:
            raise MemoryError(output.outputs[0].error)
        return length

    def metrics(self) -> MetricsReport:
        """What was counted and measured since the start."""
        with self._lock:
            return self.engine.metrics()

    def close(self) -> None:
        """Abort what runs, finish writing what is kept on disk, and give the memory back: it takes no more requests."""
        with self._lock:
            self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- what runs ------------------------------------------------------------------------------------------------

    def _begin(self) -> str:
        """The name of a new request, whose outputs somebody will take."""
        request_id = str(next(self._numbers))
        self._open.add(request_id)
        return request_id

    def _end(self, ids: Iterable[str]) -> None:
        """Nobody waits for these requests any more; those that are not finished are aborted."""
        with self._lock:
            for request_id in ids:
                self._open.discard(request_id)
                self._news.pop(request_id, None)
                if self._is_stepping:  # Python may find an iterator that nobody has any more in the middle of a step
                    self._left.append(request_id)
                else:
                    self.engine.abort_request(request_id)

    def _step(self) -> None:
        self._is_stepping = True
        try:
            outputs = self.engine.step()
        finally:
            self._is_stepping = False
            while self._left:
                self.engine.abort_request(self._left.pop())
        for output in outputs:
            if output.request_id in self._open:
                self._news[output.request_id] = output

    def _outputs(self, ids: Iterable[str]) -> Iterator[RequestOutput]:
        """The outputs of some requests, whenever they have changed; those of others wait for their readers."""
        left = set(ids)
        while left:
            with self._lock:
                changed = [self._news.pop(request_id) for request_id in [*self._news] if request_id in left]
                if not changed:
                    self._step()
            for output in changed:
                if output.finished:
                    left.discard(output.request_id)
                yield output


class _Progress(tqdm):
    """Requests, and tokens a second of prompts and answers."""

    def __init__(self, total: int, disable: bool) -> None:
        super().__init__(total=total, desc="requests", disable=disable, dynamic_ncols=True)
        self.num_read = self.num_written = 0

    def finish(self, output: RequestOutput) -> None:
        self.num_read += len(output.prompt_token_ids)
        self.num_written += sum(len(answer.token_ids) for answer in output.outputs)
        if not self.disable:
            seconds = max(self.format_dict["elapsed"], 1e-6)
            read, written = self.num_read / seconds, self.num_written / seconds
            self.set_postfix_str(f"{read:,.0f} tokens/s read, {written:,.0f} written")
        self.update()


def _check_kinds(model: Any, tokenizer: Any) -> None:
    """ValueError for what is no model, or no tokenizer, at all."""
    if not isinstance(model, str | os.PathLike | PreTrainedModel):
        raise ValueError(f"model must be a folder, a hub id or a model of transformers or OnceLM, got {shown(model)}.")
    if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike | PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer must be a name, a folder or a tokenizer of transformers, got {shown(tokenizer)}.")
    if isinstance(model, str) and model in presets() and not Path(model).exists():
        raise ValueError(
            f"{model!r} is a preset, a shape without weights; build a model of it: "
            f"LLM(oncelm.build_model({model!r}), tokenizer)."
        )


def _tokenizer_of(model: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(model)
    except ValueError as error:
        read_config(model)  # where there is no model at all, that is what is to be said
        raise ValueError(
            f"{error} Name one (tokenizer=...), or give the model itself (oncelm.load) to work with token ids."
        ) from error


def _several(prompts: Any) -> list[Prompt]:
    """Prompts as a list: one by itself is text, a mapping, or a list of numbers."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be text, token ids or a list of these, got {shown(prompts)}.")
    return [prompts] if prompts and isinstance(prompts[0], Integral) else list(prompts)


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    """One for each of `count` prompts, of one for all or a list."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name}: {len(given)} for {count} prompts; give one for all, or one for each.")
    return list(given)
