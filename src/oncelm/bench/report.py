"""Records as lines of a file, and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from oncelm.bench.record import Record
from oncelm.utils.settings import parse_json

QUIET = 0.1  # cores busy elsewhere that a timing bears


def append_record(path: str | os.PathLike[str], record: Record) -> None:
    """Append one JSON line, on disk when this returns; earlier lines are never touched."""
    line = json.dumps(record, allow_nan=False) + "\n"
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file; ValueError names a line that is none."""
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        try:
            records.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
    return records


def table(records: Sequence[Record]) -> Table:
    """The records of one run: a row each, with what it took over what the first target took at the same length."""
    first = records[0]
    columns = _MEMORY_COLUMNS if first["benchmark"] == "memory" else _time_columns(first["benchmark"])
    reference = {record["length"]: record for record in records if record["subject"] == first["subject"]}
    drawn = Table(title=_title(records), caption=_caption(records), caption_justify="left")
    drawn.add_column("tokens", justify="right")
    drawn.add_column("model")
    for title, _, key in columns:
        drawn.add_column(title, justify="right")
        if key is not None:
            drawn.add_column(f"/ {first['subject']}'s", justify="right", style="bold")
    previous = first
    for record in records:
        if record["length"] != previous["length"]:
            drawn.add_section()
        cells = [f"{record['length']:,}", record["subject"]]
        for place, (_, show, key) in enumerate(columns):
            if "error" in record:
                cells.append(record["error"] if place == 0 else "")
            else:
                cells.append(show(record))
            if key is not None:
                cells.append(_ratio(record, reference[record["length"]], key))
        drawn.add_row(*cells)
        previous = record
    return drawn


# title, how a record shows it, and the key to compare targets by
Column = tuple[str, Callable[[Record], str], str | None]

# time to first token, time per output token
TIMES = {"prefill": "TTFT", "decode": "TPOT"}


def _time_columns(benchmark: str) -> tuple[Column, ...]:
    return (
        (TIMES.get(benchmark, "time"), lambda record: show_seconds(record["seconds"]), "seconds"),
        ("tokens/s", lambda record: f"{record['tokens_per_second']:,.0f}", None),
        ("MFU", lambda record: f"{record['mfu']:.0%}" if "mfu" in record else "", None),
        ("MBU", lambda record: f"{record['mbu']:.0%}" if "mbu" in record else "", None),
        ("runs", lambda record: str(record["repeats"]), None),
        ("spread", lambda record: f"{record['spread']:.0%}", None),
    )


_MEMORY_COLUMNS: tuple[Column, ...] = (
    ("cache", lambda record: _mebibytes(record["cache_bytes"]), "cache_bytes"),
    ("peak above weights", lambda record: _mebibytes(record["peak_bytes_above_weights"]), "peak_bytes_above_weights"),
)


def _title(records: Sequence[Record]) -> str:
    models = {record["subject"]: record["parameters"] for record in records}
    sizes = ", ".join(f"{name} {count / 1e6:,.1f}M" for name, count in models.items())
    return f"{records[0]['benchmark']}: {sizes} parameters, {records[0]['dtype']}, batch {records[0]['batch_size']}"


def _caption(records: Sequence[Record]) -> str:
    first = records[0]
    environment = first["environment"]
    hardware = f"{environment['cpu']}, {environment['threads']} threads"
    if first["device"].startswith("cuda"):
        hardware = environment["gpus"][0]["name"]
    flops, moved = first["ceiling_flops_per_second"], first["ceiling_bytes_per_second"]
    busy = max(record["cores_busy_elsewhere"] for record in records)
    warning = f"\nOther processes kept up to {busy} cores busy: not a quiet machine." if busy > QUIET else ""
    return (
        f"{hardware}; measured ceilings {flops / 1e12:.3g} TFLOP/s, {moved / 1e9:.3g} GB/s; "
        f"torch {environment['torch']}, transformers {environment['transformers']}{warning}"
    )


def show_seconds(seconds: float) -> str:
    """ "1.50 s" or "12.3 ms"."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _ratio(record: Record, reference: Record, key: str) -> str:
    if record is reference or key not in record or key not in reference:
        return ""
    return f"{record[key] / reference[key]:.1f}x"
