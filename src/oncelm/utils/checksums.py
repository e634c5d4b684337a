"""A checksum of every file of a folder, and what has changed since.

Model folders have them in `SHA256SUMS`, which `sha256sum --check SHA256SUMS` reads too; checkpoints of a training run
in `manifest.json`: {"step": ..., "files": {name: sha256}}.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from oncelm.utils.settings import parse_json

SUMS, MANIFEST = "SHA256SUMS", "manifest.json"
_THREADS = 8
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_READ = (".safetensors", ".pth", ".bin", ".json", ".model", ".jinja", ".txt")  # what loading may read
_STEP = re.compile(r"step-(\d+)")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` by relative name; without the files that hold checksums."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    files = [file for file in files if file not in (folder / SUMS, folder / MANIFEST)]
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing leaves Python to other threads
        digests = pool.map(_sha256, files)
        return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write `SHA256SUMS` of the files that are there."""
    lines = [f"{digest}  {name}\n" for name, digest in checksums(folder).items()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a training run's checkpoint with its checksums."""
    return all((folder / name).is_file() for name in (MANIFEST, "trainer.json"))


def check_folder(path: str | os.PathLike[str], *, optional_parts: bool = False) -> int:
    """Compare every file with its checksum; how many there are.

    Args:
        optional_parts: whole subfolders, such as a checkpoint's `optimizer/`, may be missing.

    Raises:
        ValueError: files are damaged or missing, each of them named; or there are no checksums.
    """
    folder = Path(path)
    source = MANIFEST if is_checkpoint(folder) else SUMS
    if not (folder / source).is_file():
        raise ValueError(
            f"{path} cannot be verified: it is no folder with checksums ({SUMS}). OnceLM writes them with every model "
            "folder; `oncelm convert` makes a copy of any that has them."
        )
    damage = find_damage(folder, source)
    if optional_parts:
        damage = {name: what for name, what in damage.items() if (folder / name).parent.exists()}
    if damage:
        told = "; ".join(f"{name} {what}" for name, what in damage.items())
        raise ValueError(f"{path} is damaged: {told}.")
    return len(_read(folder, source))


def find_damage(folder: Path, source: str) -> dict[str, str]:
    """What has changed since the checksums were written: each damaged or missing file, and what is wrong with it.

    Args:
        source: the file with the checksums, SUMS or MANIFEST.
    """
    try:
        expected = _read(folder, source)
        found = checksums(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {source: f"cannot be read: {error}"}
    damage = {}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            damage[name] = "is missing"
        elif name not in expected:  # of a list that was cut off, or a file that was added; a README does no harm
            if source == SUMS and Path(name).suffix in _READ:
                damage[name] = f"is not listed in {SUMS}"
        elif found[name] != expected[name]:
            damage[name] = "does not match its checksum"
    return damage


def _read(folder: Path, source: str) -> dict[str, str]:
    text = (folder / source).read_text(encoding="utf-8")
    if source == MANIFEST:
        manifest = parse_json(text)
        step = _STEP.fullmatch(folder.name)
        if manifest.keys() != {"step", "files"} or (step and int(step[1]) != manifest["step"]):
            raise ValueError("it is not as it was written")
        return dict(manifest["files"].items())
    lines = [_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    if not text.endswith("\n") or not all(lines):
        raise ValueError("it is not as it was written")
    return {line[2]: line[1] for line in lines if line}
