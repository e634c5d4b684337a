"""Whatever a schedule makes of requests, pieces, rows, drafts and copies, logits are those of a full forward pass."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm import YocoForCausalLM
from oncelm.engine import decode_graphs, piece_graphs
from oncelm.engine.decode_graphs import DecodeGraphs, batch_sizes
from oncelm.engine.pool import Pool
from oncelm.engine.runner import Runner
from oncelm.engine.work import Piece, Row
from oncelm.models.yoco.mixers.gated_retention import GatedRetention
from oncelm.ops import gated_retention, gated_retention_step
from tests.models.small import KINDS, VOCAB, make_model

PAGES, SLOTS = 64, 9
DTYPES = [None, torch.float8_e4m3fn, torch.int8]
close = {"rtol": 1e-4, "atol": 1e-4}
# of 8 bits: where two ways of computing a key round to different numbers, logits differ
rounded = {"rtol": 2e-2, "atol": 2e-2}


class Requests:
    """Some requests in a pool, without scheduler: what each has read, its slot and its pages."""

    def __init__(self, model: YocoForCausalLM, kv_dtype: torch.dtype | None, seed: int, page_size: int = 4) -> None:
        self.model, self.kv_dtype, self.random, self.page_size = model, kv_dtype, random.Random(seed), page_size
        self.tolerance = close if kv_dtype is None else rounded
        self.pool = Pool(model, PAGES, page_size, SLOTS, kv_dtype)
        self.runner = Runner(model, self.pool, max_num_seqs=SLOTS, max_pages=16)
        self.free = self.random.sample(range(1, PAGES), PAGES - 1)
        self.slots = self.random.sample(range(1, SLOTS), SLOTS - 1)
        self.all: list[tuple[list[int], int, list[int]]] = []  # tokens read, slot, pages

    def begin(self) -> None:
        self.all.append(([], self.slots.pop(), []))
        self.pool.clear_slot(self.all[-1][1])

    def fork(self) -> None:
        """As from a snapshot: states and the last, partly filled page are copied, whole pages are shared."""
        tokens, slot, pages = self.random.choice(self.all)
        whole, part = divmod(len(tokens), self.page_size)
        own = pages[:whole]
        if part:
            own.append(self.free.pop())
            self.pool.copy_page(pages[whole], own[-1])
        self.all.append((list(tokens), self.slots.pop(), own))
        self.pool.copy_slot(slot, self.all[-1][1])

    def some(self) -> list[tuple[list[int], int, list[int]]]:
        return self.random.sample(self.all, self.random.randint(1, len(self.all)))

    def draw(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def reserve(self, pages: list[int], num_tokens: int) -> list[int]:
        while len(pages) * self.page_size < num_tokens:
            pages.append(self.free.pop())
        return pages

    def check(self, tokens: list[int], logits: torch.Tensor) -> None:
        """logits [P, V] at the last P of these tokens."""
        cache = self.model.new_cache(1, len(tokens), dtype=self.kv_dtype)
        ids = torch.tensor([tokens], device=logits.device)
        expected = self.model(ids, past_key_values=cache, logits_to_keep=len(logits)).logits[0]
        torch.testing.assert_close(logits, expected, **self.tolerance)

    def prefill(self) -> None:
        pieces = []
        for tokens, slot, pages in self.some():
            new, wanted = self.draw(self.random.choice([1, 1, 3, 6])), self.random.random() < 0.4
            pieces.append(Piece(slot, self.reserve(pages, len(tokens) + len(new)), len(tokens), new, wanted))
            tokens += new
        found = self.runner.prefill(pieces)
        for piece, hidden in zip(pieces, found, strict=True):
            assert (hidden is not None) == piece.wanted
            if hidden is not None:
                (tokens,) = (tokens for tokens, slot, _ in self.all if slot == piece.slot)
                self.check(tokens, self.runner.head(hidden))

    def decode(self, kept: tuple[int, ...] = (1, 1, 2, 4), drafts: tuple[int, ...] = (0, 0, 1, 3)) -> None:
        rows, expected = [], []
        for tokens, slot, pages in self.some():
            kept_here = self.random.choice(kept)
            new = self.draw(kept_here + self.random.choice(drafts))
            rows.append(Row(slot, self.reserve(pages, len(tokens) + len(new)), len(tokens), new, kept_here))
            expected.append(tokens + new)
            tokens += new[:kept_here]
        logits = self.runner.decode(rows)
        parts = logits.split([row.num_logits for row in rows])
        for tokens, part in zip(expected, parts, strict=True):
            self.check(tokens, part)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), kv_dtype=st.sampled_from(DTYPES))
def test_any_schedule(models, kind: str, seed: int, kv_dtype: torch.dtype | None) -> None:
    requests = Requests(models(kind), kv_dtype, seed)
    requests.begin()
    for what in requests.random.choices(["begin", "fork", "prefill", "decode", "decode"], k=8):
        if what in ("begin", "fork") and len(requests.all) == 4:
            continue
        getattr(requests, what)()


@pytest.mark.parametrize("kind", ["hybrid", "delta"])
def test_equal_schedules_give_equal_bits(kind: str) -> None:
    found = []
    for _ in range(2):
        model = make_model(kind)
        runner = Runner(model, Pool(model, 9, 4, 3), max_num_seqs=4, max_pages=4)
        runner.prefill([Piece(1, [1, 2], 0, [5, 6, 7, 8, 9]), Piece(2, [4, 3], 0, [1, 2])])
        found.append(runner.decode([Row(2, [4, 3], 2, [3, 4, 5]), Row(1, [1, 2], 5, [6])]))
    assert torch.equal(*found)


def test_nothing_to_do() -> None:
    model = make_model("retention")
    runner = Runner(model, Pool(model, 2, 4, 2), max_num_seqs=1, max_pages=1)
    assert runner.prefill([]) == []


def test_many_keys_are_read_a_head_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from oncelm.cache.yoco import paged_kv

    monkeypatch.setattr(paged_kv, "MOST_GATHERED", 0)
    for kv_dtype in DTYPES:
        requests = Requests(make_model("interleaved"), kv_dtype, seed=1)
        requests.begin()
        requests.begin()
        for _ in range(3):
            requests.prefill()
            requests.decode()


CASES = [
    *((kind, {}, None) for kind in KINDS),
    ("window", {"window_size": 16}, None),  # a ring that can be read as pages
    *(("hybrid", {}, kv_dtype) for kv_dtype in DTYPES[1:]),
]


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs whose replay runs what would have been recorded, on the same tensors."""

    def record(run, device, memory):
        logits = run()
        return SimpleNamespace(replay=run if logits is None else lambda: logits.copy_(run())), logits

    for module in (decode_graphs, piece_graphs):
        monkeypatch.setattr(module, "record", record)


def decode_with_graphs(requests: Requests) -> None:
    """Rows of one token, forks, a slot that another request gets, batches with and without drafts."""
    requests.begin()
    requests.prefill()
    for step in range(9):
        requests.decode(kept=(1,), drafts=(0,))
        if step in (2, 4):
            requests.fork()
    _, slot, _ = requests.all.pop()
    requests.all.append(([], slot, []))
    requests.pool.clear_slot(slot)
    for step in range(6):
        requests.decode(drafts=(0, 0, 1, 3) if step < 3 else (0, 8, 14))
        requests.prefill()


@pytest.mark.parametrize(("kind", "changes", "kv_dtype"), CASES)
def test_decoding_as_on_a_gpu(kind: str, changes: dict, kv_dtype: torch.dtype | None, repeats) -> None:
    requests = Requests(make_model(kind, **changes), kv_dtype, seed=4, page_size=16)
    requests.runner.graphs = DecodeGraphs(requests.model, requests.pool, 3, 16, requests.runner.last_tokens)
    decode_with_graphs(requests)
    assert all(graphs.graphs for graphs in requests.runner.graphs.widths.values())
    pieces = requests.runner.graphs.pieces
    assert (pieces is not None) == (kind in ("retention", "unstacked", "retention-only", "cross-only", "llama-like"))
    assert pieces is None or pieces.graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "changes", "kv_dtype"), CASES)
def test_decoding_in_graphs(kind: str, changes: dict, kv_dtype: torch.dtype | None, monkeypatch) -> None:
    sizes = {"hidden_size": 128, "num_self_heads": 2, "num_attention_heads": 4}
    requests = Requests(make_model(kind, **sizes, **changes).cuda(), kv_dtype, seed=4, page_size=16)
    requests.tolerance = {"rtol": 1e-3, "atol": 1e-3} if kv_dtype is None else {"rtol": 3e-2, "atol": 3e-2}
    decode_with_graphs(requests)
    assert requests.runner.graphs is not None
    assert all(graphs.graphs for graphs in requests.runner.graphs.widths.values())
    requests.model.use_cuda_graphs = False
    for _ in range(2):
        requests.decode()
        requests.prefill()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_warming_up_records_all_graphs() -> None:
    model = make_model("retention", hidden_size=128).cuda()
    runner = Runner(model, Pool(model, 9, 16, 9), max_num_seqs=8, max_pages=8)
    told = []
    runner.warm_up(100, progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 8) for n in range(1, 9)]
    assert sorted(runner.graphs.pieces.graphs) == [64, 128]
    assert sorted(runner.graphs.widths[1].graphs) == [1, 2, 4, 8]
    runner.warm_up(drafts=True)
    assert all(sorted(graphs.graphs) == [1, 2, 4, 8] for graphs in runner.graphs.widths.values())


@pytest.mark.parametrize("step", [None, lambda q, k, v, g, state: gated_retention_step(q, k, v, g, state)])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_mixer_of_somebody_else(step, graphs: bool, repeats, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no step, or one that knows no slots."""

    def mix(self, inputs, past, batch):
        return past.scan("state", gated_retention, inputs, batch, step=step)

    monkeypatch.setattr(GatedRetention, "mix", mix)
    requests = Requests(make_model("retention"), None, seed=3, page_size=16)
    if graphs:
        requests.runner.graphs = DecodeGraphs(requests.model, requests.pool, 3, 16, requests.runner.last_tokens)
    requests.begin()
    requests.begin()
    for _ in range(3):
        requests.prefill()
        requests.decode()


def test_graphs_follow_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("retention")
    graphs = DecodeGraphs(model, Pool(model, 3, 16, 3), 4, 2, torch.zeros(3, dtype=torch.long))
    assert graphs.stand_for_model()
    graphs.widths[1].graphs[1] = None
    assert graphs.stand_for_model()
    assert graphs.widths[1].graphs
    for weight in model.parameters():
        weight.data = weight.data * 1.1
    assert graphs.stand_for_model()
    assert not graphs.widths[1].graphs
    model.use_cuda_graphs = False
    assert not graphs.stand_for_model()
    model.use_cuda_graphs = True
    model.self_decoder.layers[0].register_forward_hook(lambda *given: None)
    assert not graphs.stand_for_model()


@pytest.mark.parametrize("most", [1, 2, 7, 64, 1000])
def test_few_rows_are_added_to_fill_a_graph(most: int) -> None:
    sizes = batch_sizes(most)
    assert sizes[-1] == most
    assert sizes == sorted({*sizes})
    assert all(larger <= max(2 * size, 2) for size, larger in pairwise(sizes))


def test_pieces_fill_graphs_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, several times behind each other, up to the very end of a graph; and what no graph can take."""
    monkeypatch.setattr(piece_graphs, "record", lambda run, *_: (run(), (SimpleNamespace(replay=run), None))[1])
    monkeypatch.setattr(piece_graphs, "TOKENS", (4, 8))
    monkeypatch.setattr(piece_graphs, "MOST_PIECES", 2)
    requests = Requests(make_model("retention"), None, seed=2, page_size=16)
    graphs = DecodeGraphs(requests.model, requests.pool, 4, 16, requests.runner.last_tokens)
    requests.runner.graphs, taken = graphs, []
    monkeypatch.setattr(
        graphs.pieces, "take", lambda pieces, take=graphs.pieces.take: taken.append(take(pieces)) or taken[-1]
    )
    for counts in ((1,), (4,), (8,), (9,), (3, 5), (1, 1), (2, 2, 2), (7, 1)):
        while len(requests.all) < len(counts):
            requests.begin()
        pieces = []
        for (tokens, slot, pages), count in zip(requests.all, counts, strict=False):
            new = requests.draw(count)
            pieces.append(Piece(slot, requests.reserve(pages, len(tokens) + count), len(tokens), new))
            tokens += new
        requests.runner.prefill(pieces)
    assert taken == [True, True, True, False, True, True, False, True]
    assert sorted(graphs.pieces.graphs) == [4, 8]
    requests.runner.graphs = None
    requests.decode(kept=(1,), drafts=(0,))
