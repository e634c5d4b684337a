"""A family that is made up here and registered by one line does what the others do: nothing else has to know it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import oncelm
from oncelm.bench import OwnTarget, check
from oncelm.cache.base import SequenceCache
from oncelm.cli import main
from oncelm.eval import TASKS, LanguageModel, make_task, run
from oncelm.models.base import BaseModel, Pass
from oncelm.models.causal_lm import CausalLM
from oncelm.models.checks import fingerprint
from oncelm.models.own_config import OwnConfig, checked
from oncelm.models.registry import FAMILIES, family, titles
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.session import open_session
from oncelm.models.wanted import Wanted
from oncelm.utils.constraints import Count
from tests.eval.conftest import write_haystack

SIZES = {"vocab_size": 260, "hidden_size": 16}


@checked
@strict
class SumConfig(OwnConfig):
    model_type = "sum"
    vocab_size: Count = 260
    hidden_size: Count = 16
    num_hidden_layers: Count = 1
    max_position_embeddings: Count = 4096
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        super().__post_init__(**kwargs)


class SumCache(SequenceCache):
    """The sum of what each sequence has read, [N, d]."""

    after_failure = "make a new one"

    def __init__(self, max_tokens: int | None, made_for: dict[str, Any], total: torch.Tensor) -> None:
        super().__init__([], max_tokens, made_for)
        self.total, self.held = total, (0,) * len(total)

    lengths = property(lambda self: self.held)
    device = property(lambda self: self.total.device)

    def nbytes(self) -> int:
        return self.total.nbytes

    def _select(self, index: torch.Tensor, rows: list[int]) -> None:
        self.total, self.held = self.total[index], tuple(self.held[row] for row in rows)


class SumModel(BaseModel):
    """Each position sees the sum of all tokens up to it."""

    config_class = SumConfig
    base_model_prefix = ""
    cache_keys = ("hidden_size",)
    title = "Sum"
    presets = {"sum-tiny": SIZES}  # noqa: RUF012

    def __init__(self, config: SumConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, 1e-6)
        self.add_head(config)
        self.post_init()

    @classmethod
    def peer_config(cls, config: SumConfig) -> LlamaConfig:
        return LlamaConfig(hidden_size=config.hidden_size, num_hidden_layers=1, num_attention_heads=2)

    def new_cache(self, batch_size: int = 1, max_tokens: int | None = None, dtype: Any = None) -> SumCache:
        total = torch.zeros(batch_size, self.config.hidden_size, device=self.cache_device)
        return SumCache(max_tokens, self._cache_settings(), total)

    def fingerprint(self) -> str:
        return fingerprint(self, self.config.stated_keys())

    def _stack(self) -> list[nn.Module]:
        return [self.layer, self.norm]

    def _states(self, given: Pass, wanted: Wanted) -> Iterator[tuple[slice, torch.Tensor]]:
        inputs, cache = given.inputs, given.cache
        lengths, x = inputs.batch.lengths, self.embed_tokens(inputs.gather(given.tokens))
        before = x.new_zeros(len(lengths), x.shape[-1]) if cache is None else cache.total
        parts = zip(before, x.flatten(0, 1).split(lengths), strict=True)
        sums = [start + part.cumsum(0) for start, part in parts]
        if cache is not None:
            cache.check_room(lengths)
            cache.total = torch.stack([start if not len(one) else one[-1] for start, one in zip(before, sums)])  # noqa: B905
            cache.held = tuple(map(sum, zip(cache.held, lengths, strict=True)))
            cache.columns += inputs.columns
        hidden = self.norm(self.layer(torch.cat(sums).view_as(x)))
        columns = slice(0, inputs.columns)
        yield columns, wanted.within(columns, inputs.spread(hidden))


class SumForCausalLM(CausalLM, SumModel):
    head_names = ("lm_head",)
    others = (SumModel,)

    def add_head(self, config: SumConfig) -> None:
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor, cache: SumCache, chunk_size: Any = None, progress: Any = None) -> Any:
        for part in input_ids.split(chunk_size or 64, dim=1):
            logits = self(part, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            if progress is not None:
                progress(cache.columns)
        return logits

    def prefill_chunk_size(self, batch_size: int) -> int:
        return 64


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "sum", f"{__name__}:SumForCausalLM")
    AutoConfig.register("sum", SumConfig, exist_ok=True)  # as `oncelm.models` does for what is in FAMILIES
    AutoModelForCausalLM.register(SumConfig, SumForCausalLM, exist_ok=True)


@pytest.fixture
def folder(tmp_path) -> str:
    oncelm.build("sum-tiny", "cpu", seed=1).save_pretrained(tmp_path / "sum")
    oncelm.load_tokenizer("bytes").save_pretrained(tmp_path / "sum")
    return str(tmp_path / "sum")


def test_it_is_found_by_its_presets_and_folders(folder) -> None:
    assert oncelm.describe("sum-tiny", hidden_size=8).hidden_size == 8
    model = oncelm.load(folder, "cpu", max_position_embeddings=7)
    assert type(model) is SumForCausalLM
    assert model.config.max_position_embeddings == 7
    assert family(model.config) is SumForCausalLM
    assert torch.equal(model.layer.weight, oncelm.build("sum-tiny", "cpu", seed=1).layer.weight)
    assert titles(lambda one: one.presets) == "YOCO and Sum"
    with pytest.raises(ValueError, match="did you mean 'sum-tiny'"):
        oncelm.describe("sum-tin")
    with pytest.raises(ValueError, match="mem_layers is a key of LongLLaMA models"):
        oncelm.describe("sum-tiny", mem_layers=[1])
    with pytest.raises(ValueError, match="compile is an option of YOCO and LongLLaMA models"):
        oncelm.load(folder, "cpu", compile=True)


def test_a_session_reads_steps_scores_and_returns(folder) -> None:
    model, ids = oncelm.load(folder, "cpu"), torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = model(ids).logits
    session = open_session(model, 1, 40)
    torch.testing.assert_close(session.read(ids[:, :15]), expected[:, 14])
    mark = session.mark()
    for _ in range(2):
        torch.testing.assert_close(session.step(ids[:, 15:16]), expected[:, 15])
        session.rewind(mark)
    texts = [ids[0], ids[0, :9]]
    torch.testing.assert_close(open_session(model, 2).score(texts), torch.cat((expected[0], expected[0, :9])))


def test_the_verbs_take_it(folder, tmp_path, capsys) -> None:
    assert main(["info", folder]) == 0
    assert "Sum" in capsys.readouterr().out
    assert main(["generate", "--model", folder, "--prompt", "To be", "--max-new-tokens", "3"]) == 0
    model = LanguageModel(oncelm.load(folder, "cpu"), oncelm.load_tokenizer("bytes"), "sum")
    task = make_task(
        TASKS["needle"], lengths=(400,), depths=2, runs=1, max_new_tokens=2, haystack=write_haystack(tmp_path)
    )
    assert max(check(OwnTarget(model.model), torch.float32).values()) < 1e-5  # a benchmark's gate
    assert len(run(task, model, tmp_path / "run.jsonl").samples) == 2
