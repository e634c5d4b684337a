"""`oncelm data check`: reads a folder of tokens once and compares it with its checksums."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from oncelm.data.progress import progress_bar
from oncelm.data.sealed import DamagedFile, damaged_files
from oncelm.data.shards import (
    MANIFEST,
    SCAN,
    check_shard,
    file_sizes,
    manifest_entry,
    read_info,
    read_scan,
    token_dtype,
)
from oncelm.data.tokens import read_manifest, shard_entries
from oncelm.utils.environment import usable_cores


@dataclass(frozen=True)
class Findings:
    """What a look at everything brought.

    Args:
        damaged: what is wrong, in words that name the file.
        num_shards: looked at.
        without_checksums: names of what an earlier version wrote, of which only sizes, borders and the largest id could
            be looked at.
    """

    damaged: tuple[str, ...]
    num_shards: int
    without_checksums: tuple[str, ...]


def check_folder(folder: Path) -> Findings:
    """Read every file of a folder of tokens, with a progress bar; nothing is changed.

    Raises:
        ValueError: the tokens are of another version's format.
    """
    damaged: list[str] = []
    unknown: list[str] = []
    for name, read in ((MANIFEST, read_manifest), (SCAN, read_scan)):
        try:
            if not read(folder)[1]:
                unknown.append(name)
        except FileNotFoundError:
            damaged.append(f"{folder / name} is missing")
        except DamagedFile as error:
            damaged.append(str(error))
    for tokenizer in sorted({folder / "tokenizer", *folder.glob("bpe-*")}):
        files = damaged_files(tokenizer)
        damaged += [f"{file} is damaged" for file in files or ()]
        if files is None:
            unknown.append(f"{tokenizer.name}/")
    try:
        manifest, _ = read_manifest(folder)
    except (OSError, DamagedFile):  # told of above; what the shards are is not known without it
        return Findings(tuple(damaged), 0, tuple(unknown))
    dtype = token_dtype(manifest["vocab_size"])
    shards = shard_entries(manifest)

    total = sum(sum(file_sizes(key, s["tokens"], s["documents"], dtype).values()) for key, s in shards.items())
    with progress_bar("check", total) as progress, ThreadPoolExecutor(usable_cores()) as pool:

        def check(key: str) -> str | None:
            try:
                if manifest_entry(key, read_info(folder / "shards", key)) != {"checksums": None, **shards[key]}:
                    return f"shard {key}.json is damaged: {MANIFEST} says something else"
                check_shard(folder / "shards", shards[key], dtype, whole=True, progress=progress)
            except OSError as error:
                return f"shard {key} cannot be read: {error}"
            except DamagedFile as error:
                return str(error)
            return None

        damaged += [fault for fault in pool.map(check, shards) if fault]
    unknown += [f"shard {key}" for key, shard in shards.items() if not shard.get("checksums")]
    return Findings(tuple(damaged), len(shards), tuple(unknown))
