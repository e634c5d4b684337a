"""A memory that is searched: each query attends to the `top_k` keys nearest to it (largest q.k), found by Faiss.

One index a sequence, layer and key/value head, in CPU memory. "flat" searches exactly; "ivf" and "hnsw" are faster and
may miss some: `recall` says how many.

The keys of a head have much in common, which says nothing about which of them is nearest: q.(k - c) orders them as q.k
does. An index stores keys minus c, the mean of the first ones; otherwise its cells and links would follow c alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from oncelm.cache.rows import Rows
from oncelm.utils.errors import check_choice, check_whole

INDEXES = ("flat", "ivf", "hnsw")
IVF_TRAINING_TOKENS = 4096  # an inverted file is made from the first keys; until there are so many, search is exact
HNSW_NEIGHBOURS = 32
SCORE_ERROR = 1e-5  # of the largest score: Faiss and torch add in other orders
HNSW_CANDIDATES = 2  # looked at in a search, times top_k; Faiss's own 16 in all find a third of 128


class MemoryIndex:
    """A memory for N sequences of which a query sees its `top_k` nearest keys.

    Args:
        top_k: keys a query head sees; all of a memory that has no more.
        index: "flat", "ivf" or "hnsw".
        measure_recall: search exactly as well, and count in `found` how many of the `wanted` keys the index found (or
            others that are as near).
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        top_k: int,
        index: str,
        measure_recall: bool = False,
    ) -> None:
        check_choice("memory index", index, INDEXES)
        check_whole(1, top_k=top_k)
        _faiss()  # if it is missing, that shows at once
        self.rows = Rows(batch_size, None, num_kv_heads, head_dim, dtype, torch.device("cpu"))
        self.top_k, self.kind = top_k, index
        self.measure_recall, self.found, self.wanted = measure_recall, 0, 0
        self.indexes = [[self._new_index(head_dim) for _ in range(num_kv_heads)] for _ in range(batch_size)]
        self.centers = torch.zeros(batch_size, num_kv_heads, head_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.k.dtype

    def _new_index(self, head_dim: int) -> Any:
        if self.kind == "hnsw":
            index = _faiss().IndexHNSWFlat(head_dim, HNSW_NEIGHBOURS, _faiss().METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = HNSW_CANDIDATES * self.top_k
            return index
        return _faiss().IndexFlatIP(head_dim)

    def append(self, rows: slice, k: torch.Tensor, v: torch.Tensor, at: int) -> None:
        """Remember k, v [n, t, H_kv, D] of sequences `rows`, which hold `at` tokens already."""
        stop = at + k.shape[1]
        self.rows.reserve(stop)
        self.rows.k[rows, at:stop], self.rows.v[rows, at:stop] = k, v
        for n in range(rows.start, rows.stop):
            self._extend(n, at, stop)

    def _extend(self, n: int, at: int, stop: int) -> None:
        if not at:
            self.centers[n] = self.rows.k[n, :stop].float().mean(0)
        for head, index in enumerate(self.indexes[n]):
            if self.kind == "ivf" and isinstance(index, _faiss().IndexFlatIP) and stop >= IVF_TRAINING_TOKENS:
                self.indexes[n][head] = self._inverted_file(self._keys(n, head, 0, stop))
            else:
                index.add(self._keys(n, head, at, stop))

    def _keys(self, n: int, head: int, first: int, stop: int) -> Any:
        return (self.rows.k[n, first:stop, head].float() - self.centers[n, head]).contiguous().numpy()

    def _inverted_file(self, keys: Any) -> Any:
        """An index of `keys` [S, D] by cells around centroids, of which a search reads one in eight."""
        cells = max(1, min(int(4 * len(keys) ** 0.5), len(keys) // 39))  # fewer keys a cell, and Faiss warns
        space = _faiss().IndexFlatIP(keys.shape[1])
        index = _faiss().IndexIVFFlat(space, keys.shape[1], cells, _faiss().METRIC_INNER_PRODUCT)
        index.train(keys)
        index.add(keys)
        index.nprobe = max(1, cells // 8)
        return index

    def attend(self, q: torch.Tensor, rows: slice, held: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(o [n, T, H, D], lse [n, T, H]) of q [n, T, H, D] over the nearest of `held` >= 1 tokens of `rows`."""
        wide = torch.promote_types(q.dtype, torch.float32)
        o = torch.empty(q.shape, dtype=wide)
        lse = torch.empty(q.shape[:3], dtype=wide)
        for n, head, heads in self._heads(q, rows):
            queries = q[n - rows.start, :, heads].cpu().to(wide)  # [T, G, D]
            places = self.search(queries.flatten(0, 1), n, head, held)  # [T * G, top_k], -1 for none
            keys, values = (x[n, :held, head].to(wide)[places.clamp_min(0)] for x in (self.rows.k, self.rows.v))
            scores = torch.einsum("rd,rkd->rk", queries.flatten(0, 1), keys) * q.shape[3] ** -0.5
            scores = scores.masked_fill(places < 0, -torch.inf)
            denominator = scores.logsumexp(-1)
            weights = scores.softmax(-1).nan_to_num(0.0)  # NaN: the index found nothing at all
            out = torch.einsum("rk,rkd->rd", weights, values)
            o[n - rows.start, :, heads] = out.view_as(queries)
            lse[n - rows.start, :, heads] = denominator.view(queries.shape[:2])
        return o.to(q.device), lse.to(q.device)

    def search(self, queries: torch.Tensor, n: int, head: int, held: int) -> torch.Tensor:
        """Places [R, min(top_k, held)] of the keys nearest to queries [R, D]; -1 where the index found no more."""
        count, queries = min(self.top_k, held), queries.float().contiguous()
        places = torch.from_numpy(self.indexes[n][head].search(queries.numpy(), count)[1])
        if self.measure_recall:
            scores = queries @ self.rows.k[n, :held, head].float().T
            worst = scores.topk(count).values[:, -1:]  # by score, not by place: repeated text has many equal keys
            found = scores.gather(1, places.clamp_min(0)) >= worst - SCORE_ERROR * scores.abs().amax(1, keepdim=True)
            self.found += int((found & (places >= 0)).sum())
            self.wanted += places.numel()
        return places

    def _heads(self, q: torch.Tensor, rows: slice) -> Iterator[tuple[int, int, slice]]:
        """(sequence, key/value head, its query heads)."""
        per_kv = q.shape[2] // len(self.indexes[0])
        for n in range(rows.start, rows.stop):
            for head in range(len(self.indexes[0])):
                yield n, head, slice(head * per_kv, (head + 1) * per_kv)

    def contents(self, rows: slice, held: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """k, v [n, held, H_kv, D]."""
        if held:
            yield self.rows.k[rows, :held], self.rows.v[rows, :held]

    def keep_rows(self, index: torch.Tensor, remembered: tuple[int, ...]) -> None:
        """Keep sequences `index` [M], in that order; their indexes are made anew."""
        chosen = index.tolist()
        self.rows.select(index.cpu(), max(remembered))
        head_dim = self.rows.k.shape[3]
        self.indexes = [[self._new_index(head_dim) for _ in self.indexes[0]] for _ in chosen]
        self.centers = torch.zeros(len(chosen), len(self.indexes[0]), head_dim)
        for n, row in enumerate(chosen):
            if remembered[row]:
                self._extend(n, 0, remembered[row])

    def nbytes(self) -> int:
        """Bytes of keys and values (an index holds the keys once more)."""
        return self.rows.nbytes()


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError("memory 'knn' searches with Faiss: pip install 'oncelm[knn]' (faiss-cpu)") from error
