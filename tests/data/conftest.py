"""Corpora, so small that a test makes them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from oncelm.data.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture
def write_jsonl():
    def write(path: Path, texts: Sequence[str]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_corpus(write_jsonl):
    """A corpus folder in the layout of json/train.json: {source: (weight, texts)}."""

    def write(
        root: Path,
        train: Mapping[str, tuple[float, Sequence[str]]],
        valid: Mapping[str, tuple[float, Sequence[str]]] = {},
    ) -> Path:
        (root / "json").mkdir(parents=True, exist_ok=True)
        for split, sources in (("train", train), ("valid", valid)):
            listing = [{"name": name, "weight": weight} for name, (weight, _) in sources.items()]
            if listing:
                (root / "json" / f"{split}.json").write_text(json.dumps(listing))
            for name, (_, texts) in sources.items():
                write_jsonl(root / "shards" / f"{name}.jsonl", texts)
                (root / "json" / f"{name}.json").write_text(json.dumps([f"shards/{name}.jsonl"]))
        return root

    return write


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder with a text, which everybody may read; into pytest's own folders only their owner may look."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "a.txt").write_text("It was a bright cold day in April.\n" * 20)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def permissions() -> Callable[[], AbstractContextManager[None]]:
    """Within it permissions count, for root too, who becomes nobody; what is imported there may be out of reach."""

    @contextmanager
    def counting() -> Iterator[None]:
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if was_root:
                os.seteuid(0)

    return counting
