"""From logits to tokens, for all rows of a step at once.

The order is vLLM's: functions of the user (logits_processors), logit_bias; then what must not come (allowed_token_ids,
bad_words, end tokens before min_tokens, the structure); repetition, frequency and presence penalties; here a greedy
row takes the largest. The others: temperature, min_p, top_k, top_p, a draw. Log-probabilities are of the model's own
logits, before all of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from oncelm.engine import logprobs
from oncelm.engine.noise import draw_keys, gumbel
from oncelm.engine.params import SamplingParams
from oncelm.engine.penalties import Penalties
from oncelm.engine.places import Sampled, SamplingRow
from oncelm.engine.structured import forbid
from oncelm.utils.device import send

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chosen = tuple[list[int], torch.Tensor, list[str | None]]  # rows, and what `Sampler._choose` found for them
Measured = tuple[list[int], logprobs.Measured]  # rows that want log-probabilities, and these
FAILED = -1  # in place of a token
NARROW = 1024  # of the likeliest are picked out for top_k and top_p; only where they do not do, all are sorted
LOGITS_AT_ONCE = 2**25  # in float32, of many rows: 128 MB, several times over
COLDEST = 1e-30  # temperature, above 0 in float32
ONE = 2.0**40  # the likeliest token's weight among whole numbers, whose sums are exact in any order


@dataclass(slots=True)
class Choice:
    """What was asked of the device.

    Attributes:
        logits: [M, V], which are not to be changed before it is read.
        largest: of each row of the logits, [M].
        tokens: [M] int64 on the device, -1 where there is none.
        on_host, chosen, measured: copies on their way to the host: of `tokens`, of what was found for rows that do not
            just take the likeliest, and of log-probabilities.
        event: they have arrived.
    """

    logits: torch.Tensor
    rows: Sequence[SamplingRow]
    largest: torch.Tensor
    tokens: torch.Tensor
    on_host: torch.Tensor
    chosen: list[Chosen]
    measured: list[Measured]
    event: torch.cuda.Event | None = None


class Sampler:
    """Chooses tokens.

    A choice depends on its row alone (and on logits, to the last bit): not on the rows beside it, nor on their order.

    Args:
        tokenizer: for bad_words and the text beside log-probabilities.
        eos_token_ids: what min_tokens forbids besides stop_token_ids.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.tokenizer = tokenizer
        self.eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._penalties = Penalties(vocab_size, self.device)
        self._tokens = torch.arange(vocab_size, dtype=torch.int32, device=self.device)

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        """A token for each of the rows, of logits [M, V] of any float dtype.

        A row fails alone: where its logits are not finite (-inf is, but for all of them), where one of its functions
        raises, and where nothing is left that may come.
        """
        return self.read(self.choose(logits, rows)) if rows else []

    @torch.no_grad()
    def choose(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Choice:
        """Ask the device for a token for each of the rows, without waiting for it."""
        assert logits.shape == (len(rows), self.vocab_size), (logits.shape, len(rows), self.vocab_size)
        largest, tokens = logits.max(-1)  # nan where there is one
        tokens = torch.where(largest.isfinite(), tokens, FAILED)
        special = [i for i, row in enumerate(rows) if not row.params.takes_likeliest]
        chosen = self._choose_in_blocks(logits, rows, special)
        for block, values, _ in chosen:
            places = send(block, torch.long, self.device)
            tokens[places] = torch.where(tokens[places] == FAILED, FAILED, values[0].long())
        arriving = [(block, _to_host(values), errors) for block, values, errors in chosen]
        measured = [
            (block, logprobs.Measured(*map(_to_host, values))) for block, values in self._measure(logits, rows, tokens)
        ]
        on_host, event = _to_host(tokens), None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))  # not the current device's: it may be another
        return Choice(logits, rows, largest, tokens, on_host, arriving, measured, event)

    @torch.no_grad()
    def read(self, choice: Choice) -> list[Sampled]:
        """What was chosen, once the device is so far."""
        logits, rows = choice.logits, choice.rows
        if choice.event is not None:
            choice.event.synchronize()
        found = [Sampled(token) for token in choice.on_host.tolist()]
        if any(sampled.token == FAILED for sampled in found):
            for i, value in enumerate(choice.largest.tolist()):
                found[i].error = _not_finite(value, "the model's logits")
                found[i].is_broken = found[i].error is not None
        again, measured = self._take(choice.chosen, found), choice.measured
        if again:
            for i in again:
                rows[i].memo.is_flat = found[i].is_late = True
            self._take(self._choose_in_blocks(logits, rows, again), found)
            measured = self._measure(logits, rows, send([one.token for one in found], torch.long, self.device))
        self._add_logprobs(measured, rows, found)
        return found

    def _choose_in_blocks(self, logits: torch.Tensor, rows: Sequence[SamplingRow], wanted: list[int]) -> list[Chosen]:
        size = max(1, LOGITS_AT_ONCE // self.vocab_size)
        blocks = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        return [(block, *self._choose(self._rows(logits, block), [rows[i] for i in block])) for block in blocks]

    def _rows(self, logits: torch.Tensor, wanted: list[int]) -> torch.Tensor:
        return logits[send(wanted, torch.long, self.device)]

    def _take(self, chosen: list[Chosen], found: list[Sampled]) -> list[int]:
        """Note what was chosen, but for rows that failed before; those that are to be chosen again."""
        again = []
        for block, values, errors in chosen:
            for i, error, token, left, is_settled in zip(block, errors, *values.tolist(), strict=True):
                if found[i].error is not None:
                    continue
                found[i].error = error or _nothing_left(left)
                found[i].token = int(token) if found[i].error is None else FAILED
                if not is_settled and found[i].error is None:
                    again.append(i)
        return again

    def _choose(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, list[str | None]]:
        """For each row of logits [m, V], which are used up, a token, the largest logit left to it, and whether that is
        settled (else it is to be chosen again with `is_flat`): [3, m] in float64. And errors on the way.
        """
        logits = logits.float()
        errors = [self._process(logits[i], row) if row.params.logits_processors else None for i, row in enumerate(rows)]
        self._add_biases(logits, rows)
        self._forbid(logits, rows)
        self._keep_structures(logits, rows, errors)
        penalized = [i for i, row in enumerate(rows) if row.params.has_penalties]
        if penalized:
            places = send(penalized, torch.long, self.device)
            logits[places] = self._penalties.apply(logits[places], [rows[i] for i in penalized])
        left, tokens = logits.max(-1)
        settled = torch.ones_like(left, dtype=torch.bool)
        drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy]
        if drawn:
            places = send(drawn, torch.long, self.device)
            logits = logits[places] - left[places, None]
            tokens[places], settled[places] = self._draw(logits, [rows[i] for i in drawn])
        return torch.stack((tokens.double(), left.double(), settled.double())), errors

    def _process(self, logits: torch.Tensor, row: SamplingRow) -> str | None:
        """Run a row's own functions over its logits [V], in place; what went wrong."""
        try:
            changed = logits
            for process in row.params.logits_processors or ():
                changed = process(row.prompt, row.output, changed)
                if not isinstance(changed, torch.Tensor) or changed.shape != logits.shape:
                    return f"a logits processor must return logits [{self.vocab_size}], got {_described(changed)}."
            if changed is not logits:
                logits.copy_(changed)
        except Exception as error:  # whatever it is, other requests have nothing to do with it
            return f"a logits processor raised {type(error).__name__}: {error}"
        return None

    def _add_biases(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        """logit_bias and allowed_token_ids, which are the same at every place of an answer."""
        biased = [i for i, row in enumerate(rows) if row.params.logit_bias or row.params.allowed_token_ids]
        if biased:
            logits[send(biased, torch.long, self.device)] += torch.stack([self._bias(rows[i]) for i in biased])

    def _bias(self, row: SamplingRow) -> torch.Tensor:
        if row.memo.bias is None:
            params = row.params
            bias = torch.full((self.vocab_size,), -math.inf if params.allowed_token_ids else 0.0)
            bias[list(params.allowed_token_ids or ())] = 0.0
            for token, value in (params.logit_bias or {}).items():
                bias[token] += value
            row.memo.bias = send(bias, torch.float32, self.device)
        return row.memo.bias

    def _forbid(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        """bad_words, and end tokens before min_tokens: logits of -inf."""
        forbidden = [(i, token) for i, row in enumerate(rows) for token in self._forbidden(row)]
        if forbidden:
            places = send(forbidden, torch.long, self.device).unbind(1)
            logits.index_put_(places, torch.full((), -math.inf, device=self.device))

    def _keep_structures(self, logits: torch.Tensor, rows: Sequence[SamplingRow], errors: list[str | None]) -> None:
        allowed = {}
        for i, row in enumerate(rows):
            if row.grammar is not None:
                try:
                    allowed[i] = row.grammar.allowed(row.drafts)
                except ValueError as error:  # too complex
                    errors[i] = str(error)
        if allowed:
            places = send(list(allowed), torch.long, self.device)
            logits[places] = forbid(logits[places], list(allowed.values()))

    def _forbidden(self, row: SamplingRow) -> list[int]:
        params, found = row.params, []
        if row.index < params.min_tokens:
            found += [*(() if params.ignore_eos else self.eos_token_ids), *(params.stop_token_ids or ())]
        if params.bad_words:
            for *before, last in self._bad_words(row):
                if not before or list(row.output[-len(before) :]) == before:
                    found.append(last)
        return found

    def _bad_words(self, row: SamplingRow) -> list[list[int]]:
        """The ids of each bad word, as it is spelled by itself and behind a space."""
        if row.memo.bad_words is None:
            assert self.tokenizer is not None, "bad_words without a tokenizer"
            words = [space + word for word in row.params.bad_words or () for space in ("", " ")]
            spelled = [self.tokenizer.encode(word, add_special_tokens=False) for word in words]
            row.memo.bad_words = [ids for ids in spelled if ids]
        return row.memo.bad_words

    def _draw(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [m] drawn from logits [m, V] float32 whose largest is 0, and whether they are settled [m]."""
        logits, settled = self._narrow(logits, rows)
        keys = send(draw_keys([(row.seed, row.index) for row in rows]), torch.int32, self.device)
        return (logits + gumbel(keys, self._tokens)).argmax(-1), settled

    def _narrow(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Temperature, min_p, top_k and top_p: logits of which tokens are drawn, and whether they are settled [m]."""
        asked = [
            [max(p.temperature, COLDEST), math.log(p.min_p) if p.min_p else -math.inf]
            for p in (row.params for row in rows)
        ]
        temperature, least = send(asked, torch.float32, self.device).unsqueeze(1).unbind(2)
        logits = logits / temperature  # of a tiny one: 0 and -inf, since 0 is the largest
        logits.masked_fill_(logits < least, -math.inf)
        settled = torch.ones_like(logits[:, 0], dtype=torch.bool)
        cut = [i for i, row in enumerate(rows) if 0 < row.params.top_k < self.vocab_size or row.params.top_p < 1]
        wide = [i for i in cut if self._is_wide(rows[i])]
        for some, width in ((wide, self.vocab_size), ([i for i in cut if i not in wide], NARROW)):
            if some:
                places = send(some, torch.long, self.device)
                cuts = self._keep_likeliest(logits[places], [rows[i].params for i in some], width)
                logits[places], settled[places] = cuts
        return logits, settled

    def _is_wide(self, row: SamplingRow) -> bool:
        """Whether to look at all tokens at once; functions of the user are not to be called twice."""
        return row.params.top_k > NARROW or row.memo.is_flat or bool(row.params.logits_processors)

    def _keep_likeliest(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [m, V], the largest 0, with -inf for all but the top_k of which top_p is made up; and whether these
        are among the `width` likeliest [m].

        Of equal ones those with the lowest ids are kept, so that top_k=1 is greedy.
        """
        counts = [p.top_k if 0 < p.top_k < self.vocab_size else self.vocab_size for p in params]
        width = min(width, max(counts))
        values = logits.topk(width).values if width < self.vocab_size else logits.sort(descending=True).values
        top_k = send(counts, torch.long, self.device)[:, None]
        top_p = send([p.top_p for p in params], torch.float64, self.device)[:, None]
        within = torch.arange(width, device=self.device) < top_k
        weights = _weights(values) * within
        total = weights.sum(-1, keepdim=True)
        if max(counts) > width:
            total = torch.where(top_k > width, _weights(logits).sum(-1, keepdim=True), total)
        sums = weights.cumsum(-1)
        kept = (within & (sums - weights < top_p * total)).sum(-1, keepdim=True).clamp(min=1)
        settled = (top_k <= width) | (sums[:, -1:] >= top_p * total)
        least = values.gather(1, kept - 1)
        above, equal = logits > least, logits == least
        room = kept - above.sum(-1, keepdim=True)
        return logits.masked_fill(~(above | equal & (equal.cumsum(-1, dtype=torch.int32) <= room)), -math.inf), settled[
            :, 0
        ]

    def _measure(self, logits: torch.Tensor, rows: Sequence[SamplingRow], tokens: torch.Tensor) -> list[Measured]:
        """Log-probabilities of those of the rows that want them, in blocks, where tokens [M] are chosen."""
        wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        found = []
        for start in range(0, len(wanted), logprobs.ROWS_AT_ONCE):
            block = wanted[start : start + logprobs.ROWS_AT_ONCE]
            places = send(block, torch.long, self.device)
            counts = [rows[i].params.logprobs or 0 for i in block]
            found.append((block, logprobs.measure(logits[places], tokens[places].clamp(min=0), counts)))
        return found

    def _add_logprobs(self, measured: list[Measured], rows: Sequence[SamplingRow], found: list[Sampled]) -> None:
        for block, values in measured:
            counts = [rows[i].params.logprobs or 0 for i in block]
            for i, table in zip(block, logprobs.tables(values, counts, self.tokenizer), strict=True):
                found[i].logprobs = table if found[i].error is None else None


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy that is under way: from a GPU into pinned memory."""
    return x.to("cpu", non_blocking=True)


def _weights(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities, times a factor, in whole numbers; the largest logit is 0."""
    return (logits.exp() * ONE).long()


def _not_finite(largest: float, what: str) -> str | None:
    if math.isfinite(largest):
        return None
    kind = "NaN" if math.isnan(largest) else "infinite" if largest > 0 else "all -inf"
    return f"{what} are not finite ({kind})."


def _nothing_left(largest: float) -> str | None:
    if largest == -math.inf:
        return "no token may come here: allowed_token_ids, bad_words, min_tokens or the structure leave none."
    return _not_finite(largest, "the logits behind logits_processors")


def _described(value: object) -> str:
    return f"logits {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
