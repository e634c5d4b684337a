#!/usr/bin/env python3
"""Build a corpus of about 470M tokens of documentation and code, from Debian and Python packages.

    pip install 'oncelm[data]' -r recipes/corpus/requirements.txt
    python recipes/corpus/build.py CORPUS                          # everything: 2.2 GB to download, some minutes
    python recipes/corpus/build.py CORPUS --only zsh-doc jinja2    # some packages
    oncelm train CORPUS --out runs/first --tokenizer cl100k_base

A document is a whole package: every page of a manual, every file of a repository (of the Linux kernel, a document is
a directory such as fs/ext4). Versions are pinned; pip checks the hashes in python.txt, apt the signatures of its
archive. Nothing of a package is run. Stopped at any moment, the same command goes on where it was: a package is done
when its shard is there.

    CORPUS/json/train.json, valid.json     the sources with their weights, as `oncelm train` reads them
    CORPUS/shards/NAME.jsonl.zst           one package each; a line is {"text": ..., "package": ..., "licence": ...}
    CORPUS/sources.jsonl                   what each shard was made of, and under which licence
    CORPUS/downloads/                      the packages, free to delete

Needs apt-get and dpkg-deb for the Debian half (`--only` with names from python.txt does without), at least Python 3.11.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from documents import Document, debian_document, kernel_documents, wheel_document
from tqdm import tqdm

from oncelm.data.reading import zstd_module
from oncelm.utils.errors import check_choice
from oncelm.utils.files import atomic_file

HERE = Path(__file__).parent
# Kept out of training to measure on; whole packages, so that no text of theirs has been seen.
VALIDATION = {"zsh-doc", "debian-reference-en", "git-doc", "jinja2", "tornado", "xarray", "luigi"}
# Any machine gets the same wheels: those of CPython 3.11 on Linux.
PLATFORM = ["--python-version=3.11", "--implementation=cp"]
PLATFORM += [f"--abi={abi}" for abi in ("cp311", "abi3", "none")]
PLATFORM += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 27, 28, 31, 34, 35)]
PLATFORM += [f"--platform=manylinux{year}_x86_64" for year in ("1", "2010", "2014")]


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    kind: str  # "docs" and "linux" (Debian), "code" (Python)
    requirement: str  # a line of debian.txt or python.txt

    @property
    def source(self) -> str:
        return self.kind + ("-validation" if self.name in VALIDATION else "")


def packages() -> list[Package]:
    """What the corpus is made of, in order."""
    found = []
    for kind, separator in (("docs", "="), ("code", "==")):
        for line in (HERE / {"docs": "debian.txt", "code": "python.txt"}[kind]).read_text().splitlines():
            name, _, rest = line.partition(separator)
            own_kind = "linux" if name.startswith("linux-source") else kind
            found.append(Package(name, rest.split()[0], own_kind, line))
    return found


def build(package: Package, corpus: Path) -> dict[str, Any]:
    """Write the shard of one package; returns its line of sources.jsonl."""
    downloads = corpus / "downloads"
    if package.kind == "code":
        archive = download_wheel(package, downloads)
        documents = [wheel_document(archive)]
    else:
        archive = download_deb(package, downloads)
        with tempfile.TemporaryDirectory(dir=corpus) as unpacked:
            command("dpkg-deb", "--extract", str(archive), unpacked)
            read = kernel_documents if package.kind == "linux" else lambda folder: [debian_document(folder)]
            documents = read(Path(unpacked))
    if not any(document.text for document in documents):
        raise ValueError(f"package {package.name} gave no text.")
    write_shard(shard_path(package, corpus), package, documents)
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": package.name,
        "version": package.version,
        "source": package.source,
        "documents": len(documents),
        "files": sum(document.files for document in documents),
        "characters": sum(len(document.text) for document in documents),
        "archive": archive.name,
        "sha256": digest,
        "licence": documents[0].licence,
    }


def shard_path(package: Package, corpus: Path) -> Path:
    return corpus / "shards" / f"{package.name}.jsonl.zst"


def write_shard(path: Path, package: Package, documents: list[Document]) -> None:
    with atomic_file(path) as temporary, zstd_module().open(temporary, "wt", level=6, encoding="utf-8") as file:
        for document in documents:
            # a Debian package's licence is a page or more, and stands in sources.jsonl
            licence = "see sources.jsonl" if package.kind == "docs" else document.licence
            line = {"text": document.text, "package": f"{package.name} {package.version}", "licence": licence}
            file.write(json.dumps(line) + "\n")


def download_deb(package: Package, downloads: Path) -> Path:
    """The package's archive; apt-get checks it against the signed index."""
    pattern = f"{package.name}_{package.version.replace(':', '%3a')}_*.deb"
    if not any(downloads.glob(pattern)):
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            command("apt-get", "download", "-qq", package.requirement, cwd=folder)
            archive = next(Path(folder).glob(pattern))
            archive.replace(downloads / archive.name)
    return next(downloads.glob(pattern))


def download_wheel(package: Package, downloads: Path) -> Path:
    """The package's wheel; pip checks its hash, also of one that is there already."""
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(package.requirement + "\n")
        where = ["--dest", str(downloads), "--requirement", str(requirement)]
        checks = ["--require-hashes", "--no-deps", "--only-binary=:all:", *PLATFORM]
        command(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *checks, *where)
    wheels = [path for path in downloads.iterdir() if path.suffix == ".whl"]
    named = [
        path for path in wheels if path.name.lower().replace("_", "-").startswith(f"{package.name}-{package.version}-")
    ]
    if len(named) != 1:
        raise ValueError(f"expected one wheel of {package.name} {package.version} in {downloads}, found {len(named)}.")
    return named[0]


def command(*arguments: str, cwd: str | None = None) -> None:
    """Run a program; when it fails, the last line it said is the error."""
    try:
        subprocess.run(arguments, cwd=cwd, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ValueError(
            f"{arguments[0]} is not installed; --only with names from python.txt does without it."
        ) from None
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.startswith(("E:", "ERROR"))] or [
            error.stderr.strip()
        ]
        raise ValueError(f"{' '.join(arguments[:2])} failed: {said[0]}") from None


def write_layout(corpus: Path, records: list[dict[str, Any]]) -> None:
    """json/ as `oncelm train` reads it: a source's weight is its share of the characters."""
    shards: dict[str, list[str]] = defaultdict(list)
    characters: dict[str, int] = defaultdict(int)
    for record in records:
        shards[record["source"]].append(f"shards/{record['name']}.jsonl.zst")
        characters[record["source"]] += record["characters"]
    for source, paths in shards.items():
        write_json(corpus / "json" / f"{source}.json", paths)
    for split, suffix in (("train", ""), ("valid", "-validation")):
        names = [f"{kind}{suffix}" for kind in ("docs", "code", "linux") if f"{kind}{suffix}" in shards]
        if names:
            write_json(corpus / "json" / f"{split}.json", [{"name": n, "weight": characters[n]} for n in names])


def write_json(path: Path, value: object) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="the folder to build")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these packages alone (all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="packages at a time (one a core)")
    args = parser.parse_args()
    chosen = packages()
    for name in args.only or []:
        check_choice("package", name, [package.name for package in chosen])
    chosen = [package for package in chosen if args.only is None or package.name in args.only]

    (args.corpus / "downloads").mkdir(parents=True, exist_ok=True)
    log = args.corpus / "sources.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    known = {record["name"]: record for record in map(json.loads, lines)}
    done = {p.name: known[p.name] for p in chosen if p.name in known and known[p.name]["version"] == p.version}
    done = {p.name: done[p.name] for p in chosen if p.name in done and shard_path(p, args.corpus).exists()}
    missing = [package for package in chosen if package.name not in done]
    with (
        concurrent.futures.ProcessPoolExecutor(args.workers) as pool,
        tqdm(total=len(chosen), initial=len(done), desc="packages", unit="package") as bar,
    ):
        try:
            tasks = {pool.submit(build, package, args.corpus): package for package in missing}
            for task in concurrent.futures.as_completed(tasks):
                known[tasks[task].name] = done[tasks[task].name] = task.result()
                bar.update()
                with atomic_file(log) as temporary:
                    temporary.write_text("".join(json.dumps(known[name]) + "\n" for name in sorted(known)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_layout(args.corpus, [done[package.name] for package in chosen])
    characters = sum(record["characters"] for record in done.values())
    print(f"{len(done)} packages, {characters / 1e6:,.0f} million characters. Next: oncelm data prepare {args.corpus}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"build.py: error: {error}")
