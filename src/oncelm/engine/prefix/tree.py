"""Which texts are known, and the snapshots on them: found by content, block by block.

A text is a chain of digests, one every BLOCK tokens, each of the block's tokens and of the digest before. The first one
stands for the model and the salt: nothing is found across them. A snapshot hangs on the digest of its last full
block, under the tokens behind it (its tail), so it may stand at any token.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from oncelm.engine.prefix.delta import Delta

BLOCK = 256  # tokens a digest; whatever the size of a page is, so that files serve engines of any page size
_TOKEN_BYTES = 4


def encode(tokens: Sequence[int]) -> bytes:
    """Token ids as they are hashed and kept: int32, in a row."""
    return array("i", tokens).tobytes()


def root_digest(fingerprint: str, salt: str | None) -> bytes:
    """The digest of no text yet, of a model and a salt."""
    return blake2b(json.dumps([fingerprint, salt]).encode(), digest_size=16, person=b"oncelm-root").digest()


def snapshot_key(block: bytes, tail: bytes) -> bytes:
    """The digest of a whole text: of its last full block's digest, and of its tail."""
    return blake2b(block + tail, digest_size=16, person=b"oncelm-snapshot").digest()


class Chain:
    """The digests of one text, each computed once, when it is asked for first. The text may grow; what was there stays.

    A caller who looks up a long text again and again keeps its chain.
    """

    __slots__ = ("digests",)

    def __init__(self, root: bytes) -> None:
        self.digests = [root]

    def at(self, tokens: Sequence[int], depth: int) -> bytes:
        """The digest of the first `depth` blocks of `tokens`."""
        digests = self.digests
        while len(digests) <= depth:
            start = (len(digests) - 1) * BLOCK
            block = encode(tokens[start : start + BLOCK])
            digests.append(blake2b(digests[-1] + block, digest_size=16).digest())
        return digests[depth]


@dataclass(eq=False, slots=True)
class Snapshot:
    """The first n tokens of a text: what is known of it, and where it is kept.

    Below the device, only what lies between `parent` and it is kept. Its parent is the snapshot that its request came
    from or left behind before: its keys and values are the same bits as far as the parent's go. Another snapshot on the
    same text may have been computed in other pieces; the two are never mixed.

    Attributes:
        root, block, tail: the digest of no text, of its full blocks, and the tokens behind them.
        blocks: the digests of its blocks behind those of its parent.
        text: its tokens behind its parent, encoded; None where only a file has them.
        slot, pages: on the device; slot 0: not there.
        host: in CPU memory.
        pending: what is on the way to the disk.
        file: bytes of its file; 0: none.
        checksum: of its file.
        known: in the tree.
    """

    n: int
    root: bytes
    block: bytes
    tail: bytes
    parent: Snapshot | None
    blocks: Sequence[bytes]
    text: bytes | None
    key: bytes = field(init=False)
    children: set[Snapshot] = field(default_factory=set)
    slot: int = 0
    pages: Sequence[int] = ()
    host: Delta | None = None
    pending: Delta | None = None
    file: int = 0
    checksum: str = ""
    known: bool = False

    def __post_init__(self) -> None:
        self.key = snapshot_key(self.block, self.tail)

    @property
    def start(self) -> int:
        """Where what is its own begins."""
        return self.parent.n if self.parent else 0

    @property
    def is_below(self) -> bool:
        """Kept in CPU memory, on disk or on the way there."""
        return bool(self.host or self.pending or self.file)

    @property
    def is_kept(self) -> bool:
        return bool(self.slot or self.is_below)


@dataclass(slots=True)
class _Block:
    """A full block of known text.

    Attributes:
        before: the digest of the text up to it; None of a root.
        uses: blocks behind it, and snapshots on it.
        tails: the snapshots on it, by how many tokens they have behind it, and by these.
    """

    before: bytes | None
    uses: int = 0
    tails: dict[int, dict[bytes, Snapshot]] = field(default_factory=dict)


class Tree:
    """All snapshots, by text. A lookup costs a digest a block, as far as the text is known."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, _Block] = {}
        self._snapshots: dict[bytes, Snapshot] = {}

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(list(self._snapshots.values()))

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> Snapshot | None:
        return self._snapshots.get(key)

    def find(self, tokens: Sequence[int], chain: Chain) -> tuple[Snapshot | None, int]:
        """The longest snapshot at n <= len(tokens) - 1, and how far the tokens are known: to a border of a block, or to
        a snapshot behind it."""
        if chain.digests[0] not in self._blocks:
            return None, 0
        length, depth = len(tokens), 0
        while (depth + 1) * BLOCK <= length and chain.at(tokens, depth + 1) in self._blocks:
            depth += 1
        shared = depth * BLOCK
        for place in range(depth, -1, -1):
            if not (tails := self._blocks[chain.digests[place]].tails):
                continue
            text = encode(tokens[place * BLOCK : (place + 1) * BLOCK])
            for rest in sorted(tails, reverse=True):
                n = place * BLOCK + rest
                if n <= length and (found := tails[rest].get(text[: rest * _TOKEN_BYTES])):
                    shared = max(shared, n)
                    if n < length:
                        return found, shared
        return None, shared

    def insert(self, snapshot: Snapshot) -> None:
        """Add a snapshot whose parent, if it has one, is there or was when its blocks were added."""
        before = snapshot.parent.block if snapshot.parent else snapshot.root
        if before not in self._blocks:
            assert before == snapshot.root, "a snapshot's parent is not in the tree"
            self._blocks[before] = _Block(None)
        for digest in snapshot.blocks:
            if digest not in self._blocks:
                self._blocks[digest] = _Block(before)
                self._blocks[before].uses += 1
            before = digest
        block = self._blocks[snapshot.block]
        block.uses += 1
        block.tails.setdefault(len(snapshot.tail) // _TOKEN_BYTES, {})[snapshot.tail] = snapshot
        self._snapshots[snapshot.key] = snapshot
        snapshot.known = True
        if snapshot.parent:
            snapshot.parent.children.add(snapshot)

    def forget_unless_kept(self, snapshot: Snapshot) -> None:
        """Remove a snapshot that is nowhere any more."""
        if snapshot.known and not snapshot.is_kept:
            self.remove(snapshot)

    def remove(self, snapshot: Snapshot) -> None:
        """Forget a snapshot, and text that belongs to no other. Its children become its parent's."""
        snapshot.known = False
        del self._snapshots[snapshot.key]
        parent = snapshot.parent
        if parent:
            parent.children.discard(snapshot)
        for child in snapshot.children:
            child.parent, child.blocks = parent, [*snapshot.blocks, *child.blocks]
            child.text = None if snapshot.text is None or child.text is None else snapshot.text + child.text
            if parent:
                parent.children.add(child)
        snapshot.children = set()
        block = self._blocks[snapshot.block]
        rest = len(snapshot.tail) // _TOKEN_BYTES
        del block.tails[rest][snapshot.tail]
        if not block.tails[rest]:
            del block.tails[rest]
        digest: bytes | None = snapshot.block
        while digest is not None:
            block = self._blocks[digest]
            block.uses -= 1
            if block.uses:
                break
            del self._blocks[digest]
            digest = block.before
