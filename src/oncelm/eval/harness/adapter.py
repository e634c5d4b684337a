"""lm-eval's view of a model: its requests in, our scoring behind it.

    lm_eval --model oncelm --model_args pretrained=runs/books/model --tasks arc_easy
    lm_eval.simple_evaluate(model=OnceLM(LanguageModel(model, tokenizer, "mine")), tasks=["arc_easy"])

Text becomes tokens as in lm-eval's own HFLM, and log-likelihoods equal HFLM's; what differs is what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from oncelm.data.tokenizers import load_tokenizer
from oncelm.eval.examples import Generate
from oncelm.eval.harness.scoring import Answer, score_requests
from oncelm.eval.harness.tree import Request
from oncelm.eval.model import LanguageModel
from oncelm.eval.prefix import PrefixReader
from oncelm.eval.runner import LOOK_AHEAD
from oncelm.models.load import load, read_config
from oncelm.models.session import check_options
from oncelm.utils.errors import check_whole, unknown

UNBOUNDED = 1 << 30  # tokens: of models that were made for any length
GENERATED = 256  # tokens at most, where a task does not say
# of --model_args
ARGUMENTS = (
    "pretrained", "tokenizer", "device", "dtype", "compile", "max_length", "mem_layers", "memory",
    "last_context_length",
)  # fmt: skip
# what a task may set: the last four change nothing where the likeliest token is taken
GREEDY = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p")


@register_model("oncelm")
class OnceLM(TemplateLM):
    """A language model for lm-eval 0.4.13.

    Args:
        model: the model and its tokenizer.
        max_length: tokens of a text, longer ones are cut on the left; None means what the model was made for.
    """

    def __init__(self, model: LanguageModel, max_length: int | None = None) -> None:
        super().__init__()
        self.model, self.session = model, model.session()
        self.tokenizer: Any = model.codec.tokenizer
        self.max_length = max_length or model.longest or UNBOUNDED
        self._encoded: dict[str, list[int]] = {}
        # what a chat template writes, </s> among it, is meant as tokens, also where the tokenizer keeps typed ones text
        self._reading: dict[str, bool] = {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """What `lm_eval --model oncelm --model_args ...` makes; batches are as large as fits, whatever it asks for."""
        options = {"device": (additional_config or {}).get("device"), **arg_dict}
        for name in ("batch_size", "max_batch_size"):
            options.pop(name, None)
        max_length = options.pop("max_length", None)
        if max_length is not None:
            check_whole(1, max_length=max_length)
        return cls(open_model(**options), max_length)

    # -- tokens, as HFLM makes them ---------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        prefix = self.tokenizer.eos_token_id if bos is None else bos
        if prefix is None:
            raise ValueError("a text without context needs a tokenizer with a bos or eos token to stand before it.")
        return prefix

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        options = dict(self._reading)
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        elif string in self._encoded:
            return self._encoded[string]
        elif self._brings_prefix(string):
            options["add_special_tokens"] = False
        return self.tokenizer.encode(string, **options)

    def _brings_prefix(self, text: str) -> bool:
        """Whether a text brings its <s> along, and so gets no other."""
        has_prefix = self.tokenizer.bos_token_id is not None or self.tokenizer.eos_token_id is not None
        return has_prefix and has_bos_prefix(text, self.tokenizer.decode(self.prefix_token_id))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._reading = {"split_special_tokens": False}
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # -- what lm-eval asks ------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        pairs = [request.args for request in requests]
        texts = dict.fromkeys(text for before, after in pairs for text in (before.rstrip(), before + after))
        plain = [text for text in texts if not self._brings_prefix(text)]
        # all at once, which the tokenizer does on all cores, instead of one by one as they are asked for
        self._encoded = dict(zip(plain, self.tokenizer(plain, **self._reading).input_ids, strict=True)) if plain else {}
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(asked), desc="log-likelihoods", disable=disable_tqdm, dynamic_ncols=True) as bar:
            answers = score_requests(self.model, self.session, asked, bar.update)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        if not (context and continuation):
            raise ValueError(
                f"a request needs a token of context and one to score, at least; it has {len(context)} and "
                f"{len(continuation)}."
            )
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation):,} tokens is longer than {self.model.name} reads "
                f"({self.max_length:,})."
            )
        whole = np.array(context + continuation, np.int32)[-(self.max_length + 1) :]  # the last is predicted, not read
        return Request(whole[: -len(continuation)], whole[-len(continuation) :])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(part)) for part in parts]
            windows += own
            counts.append(len(own))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        examples, stops = [], []
        for context, options in (request.args for request in requests):
            new_tokens, until = self._settings(options)
            longest = self.max_length - new_tokens
            if longest < 1:
                raise ValueError(
                    f"the task asks for {new_tokens} new tokens; {self.model.name} has room for {self.max_length} "
                    "in all."
                )
            examples.append(Generate(np.array(self.tok_encode(context)[-longest:], np.int32), "", new_tokens))
            stops.append(until)
        order = sorted(range(len(examples)), key=lambda i: examples[i].prompt.tolist())
        texts = [""] * len(examples)
        prefix = PrefixReader(self.model)
        for place, i in enumerate(tqdm(order, desc="generation", disable=disable_tqdm, dynamic_ncols=True)):
            upcoming = [examples[later] for later in order[place + 1 : place + 1 + LOOK_AHEAD]]
            texts[i] = self._write(prefix, examples[i], upcoming, stops[i])
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _settings(self, options: dict[str, Any]) -> tuple[int, list[str]]:
        """New tokens at most, and the texts that end an answer: the task's and, as HFLM has it, the end token's."""
        settings = normalize_gen_kwargs(options, GENERATED)
        if settings["do_sample"]:
            raise ValueError(f"generation is greedy here; the task asks for sampling: {options}.")
        for name, value in settings.items():
            if name not in GREEDY and not (name == "num_beams" and value == 1):
                raise ValueError(
                    f"generation is greedy here; the task sets {name}={value!r}, which lm-eval's --model hf knows. "
                    f"Allowed: {', '.join(GREEDY)}."
                )
        until = [] if settings["until"] == [None] else settings["until"]
        if not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"until must be a text or a list of texts, got {options['until']!r}.")
        check_whole(1, max_gen_toks=settings["max_gen_toks"])
        end = self.tokenizer.eos_token_id
        stops = until if end is None else [*until, self.tokenizer.decode(end)]
        return settings["max_gen_toks"], [stop for stop in stops if stop]

    def _write(self, prefix: PrefixReader, example: Generate, upcoming: Sequence[Generate], stops: list[str]) -> str:
        """The greedy continuation up to the first stop or end of text."""

        def is_complete(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids)  # with special tokens: a stop may be one
            return any(stop in text for stop in stops)

        reader, _ = prefix.read(example, upcoming)
        ids = reader.generate(example.max_new_tokens, is_complete, keep_end=True)
        return postprocess_generated_text(self.tokenizer.decode(ids, skip_special_tokens=True), stops, None)


def open_model(
    pretrained: str = "",
    tokenizer: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
    mem_layers: Sequence[int] | int | None = None,
    memory: str | None = None,
    last_context_length: int | None = None,
    **unknown_options: Any,
) -> LanguageModel:
    """The model of lm-eval's --model_args: what `oncelm eval` takes, with a folder's own tokenizer.

    Raises:
        ValueError: no model named, an unknown argument (with the nearest), or what `oncelm.load` raises.
    """
    for name in unknown_options:
        raise unknown("argument of --model oncelm", name, ARGUMENTS)
    if not pretrained:
        raise ValueError("--model oncelm needs a model: --model_args pretrained=DIR.")
    if isinstance(mem_layers, str):
        raise ValueError(f'mem_layers must be a list, as in {{"mem_layers": [8, 16]}}, got {mem_layers!r}.')
    layers = [mem_layers] if isinstance(mem_layers, int) else mem_layers
    overrides: dict[str, Any] = {} if layers is None else {"mem_layers": list(layers)}
    config = read_config(pretrained, **overrides)
    given = (("cache_options", "memory", memory), ("read_options", "last_context_length", last_context_length))
    options = {kind: {} if value is None else {name: value} for kind, name, value in given}
    check_options(config, **options)
    model = load(pretrained, device, None if dtype == "auto" else dtype, compile=compile, config=config, **overrides)
    return LanguageModel(model, load_tokenizer(tokenizer or pretrained), Path(pretrained).name, **options)
