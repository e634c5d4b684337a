"""What a LongLLaMA costs."""

from __future__ import annotations

from dataclasses import dataclass

from oncelm.models.longllama.config import LongLlamaConfig
from oncelm.models.work import TRAINING_BYTES, LlamaWork, Work, causal_pairs
from oncelm.ops.crossbatch import earlier_contexts


@dataclass(frozen=True)
class LongLlamaWork(LlamaWork):
    """The costs of a LongLLaMA: w tokens a window, M memory layers, which see everything; the others see the window.

    Tokens kept out of memory at the end of a prefill (`last_context_length`) are counted as one more window.

    Attributes:
        memory_element_size: bytes of a number of the memory, its share of a scale included; None: `element_size`.
    """

    config: LongLlamaConfig
    memory_element_size: float | None = None

    @property
    def memory_bytes(self) -> float:
        """That a token leaves in the memory of one layer."""
        return self.cached * (self.memory_element_size or self.element_size)

    def _pairs(self, T: int) -> int:
        """(query, key) pairs in all layers of T tokens read from the start."""
        w, memory = self.config.max_position_embeddings, len(self.config.mem_layers)
        local = T // w * causal_pairs(w) + causal_pairs(T % w)
        return memory * causal_pairs(T) + (self.config.num_hidden_layers - memory) * local

    def _read(self, S: int) -> tuple[int, int]:
        """Keys that one token behind S others meets in all memory layers, and in all others: half a window each, on
        average."""
        memory = len(self.config.mem_layers)
        local = min(S + 1, (self.config.max_position_embeddings + 1) // 2)
        return memory * (S + 1), (self.config.num_hidden_layers - memory) * local

    def prefill(self, B: int, T: int) -> Work:
        """As a Llama's; only the memory layers keep all that they have seen."""
        layers, kept = self.config.num_hidden_layers, len(self.config.mem_layers)
        return Work(
            linear=2 * B * (T * layers * self.layer + self.head),
            mixing=4 * self.config.hidden_size * B * self._pairs(T),
            bytes=self.weights * self.element_size + B * T * kept * self.memory_bytes,
        )

    def decode(self, B: int, S: int) -> Work:
        memory, local = self._read(S)
        return Work(
            linear=2 * B * self.weights,
            mixing=4 * self.config.hidden_size * B * (memory + local),
            bytes=(self.weights + B * local * self.cached) * self.element_size + B * memory * self.memory_bytes,
        )

    def train(self, B: int, T: int) -> Work:
        """One forward and backward pass on B rows: with crossbatch, the memory layers also meet whole rows before."""
        c = self.config
        pairs = B * self._pairs(T)
        if c.cross_batch_range and c.mem_layers:
            seen = sum(earlier_contexts(B, c.cross_batch_range, c.cross_batch_stepping, c.dataset_packing))
            pairs += len(c.mem_layers) * seen * T * T
        return Work(3 * 2 * B * T * self.weights, 3 * 4 * c.hidden_size * pairs, TRAINING_BYTES * self.weights)
