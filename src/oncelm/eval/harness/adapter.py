"""lm-eval's view of a model: its requests in, our scoring behind it.

    lm_eval.simple_evaluate(model=OnceLM(LanguageModel(model, tokenizer, "mine")), tasks=["arc_easy"])

Text becomes tokens as in lm-eval's own HFLM, and log-likelihoods equal HFLM's; what differs is what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from oncelm.eval.examples import Generate
from oncelm.eval.harness.rows import new_rows
from oncelm.eval.harness.scoring import Answer, score_requests
from oncelm.eval.harness.tree import Request
from oncelm.eval.model import LanguageModel
from oncelm.eval.prefix import PrefixReader
from oncelm.eval.runner import LOOK_AHEAD

UNBOUNDED = 1 << 30  # tokens: of models that were made for any length
GENERATED = 256  # tokens at most, where a task does not say


class OnceLM(TemplateLM):
    """A language model for lm-eval 0.4.13.

    Args:
        model: the model and its tokenizer.
        max_length: tokens of a text, longer ones are cut on the left; None means what the model was made for.
    """

    def __init__(self, model: LanguageModel, max_length: int | None = None) -> None:
        super().__init__()
        self.model, self.rows = model, new_rows(model)
        self.tokenizer: Any = model.codec.tokenizer
        self.max_length = max_length or model.longest or UNBOUNDED
        self._encoded: dict[str, list[int]] = {}

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
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None:
            if string in self._encoded:
                return self._encoded[string]
            if self._brings_prefix(string):
                options["add_special_tokens"] = False
        return self.tokenizer.encode(string, **options)

    def _brings_prefix(self, text: str) -> bool:
        """Whether a text brings its <s> along, and so gets no other."""
        has_prefix = self.tokenizer.bos_token_id is not None or self.tokenizer.eos_token_id is not None
        return has_prefix and has_bos_prefix(text, self.tokenizer.decode(self.prefix_token_id))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
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
        self._encoded = dict(zip(plain, self.tokenizer(plain).input_ids, strict=True)) if plain else {}
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(asked), desc="log-likelihoods", disable=disable_tqdm, dynamic_ncols=True) as bar:
            answers = score_requests(self.rows, asked, bar.update)
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
            settings = normalize_gen_kwargs(options, GENERATED)
            if settings["do_sample"]:
                raise ValueError(f"generation is greedy here; the task asks for sampling: {options}.")
            longest = self.max_length - settings["max_gen_toks"]
            if longest < 1:
                raise ValueError(
                    f"the task asks for {settings['max_gen_toks']} new tokens; {self.model.name} has room for "
                    f"{self.max_length} in all."
                )
            ids = np.array(self.tok_encode(context)[-longest:], np.int32)
            examples.append(Generate(ids, "", settings["max_gen_toks"]))
            stops.append([stop for stop in settings["until"] if stop])
        order = sorted(range(len(examples)), key=lambda i: examples[i].prompt.tolist())
        texts = [""] * len(examples)
        prefix = PrefixReader(self.model)
        for place, i in enumerate(tqdm(order, desc="generation", disable=disable_tqdm, dynamic_ncols=True)):
            upcoming = [examples[later] for later in order[place + 1 : place + 1 + LOOK_AHEAD]]
            texts[i] = self._write(prefix, examples[i], upcoming, stops[i])
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _write(self, prefix: PrefixReader, example: Generate, upcoming: Sequence[Generate], stops: list[str]) -> str:
        """The greedy continuation up to the first stop or end of text."""
        end = self.tokenizer.eos_token_id

        def is_complete(ids: list[int]) -> bool:
            return ids[-1] == end or any(stop in self.model.codec.decode(ids) for stop in stops)

        reader, _ = prefix.read(example, upcoming)
        text = self.model.codec.decode(reader.generate(example.max_new_tokens, is_complete))
        return postprocess_generated_text(text, stops, None)
