"""Any text is prepared within a gigabyte, and about as fast as any other."""

from __future__ import annotations

import random
import string
import subprocess
import sys

import pytest

CODE = """
import re, sys, time
from pathlib import Path
from oncelm.cli import main
begin = time.process_time()
status = main(["data", "prepare", *sys.argv[1:], "--workers", "2"])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(status, time.process_time() - begin, int(peak[1]) / 2**20, file=sys.stderr)
"""
SIZE = 40 << 20
TEXTS = {
    "one letter": lambda: "a" * SIZE,
    "letters": lambda: "".join(random.Random(0).choices(string.ascii_letters, k=SIZE)),
    "spaces": lambda: " " * (SIZE // 2),
    "characters of four bytes": lambda: "\U0001f600" * (SIZE // 4),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:1000", "cl100k_base"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_40_mib_without_a_break(tmp_path, text, tokenizer) -> None:
    if tokenizer == "cl100k_base":
        pytest.importorskip("tiktoken")
    file = tmp_path / "text.txt"
    file.write_text(TEXTS[text](), encoding="utf-8")
    command = [sys.executable, "-c", CODE, str(file), "--tokenizer", tokenizer, "--out", str(tmp_path / "tokens")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status, seconds, gibibytes = done.stderr.splitlines()[-1].split()
    print(f"{text}, {tokenizer}: {float(seconds):.1f} s of processor time, {float(gibibytes):.2f} GiB")
    assert status == "0"
    assert float(gibibytes) < 1
    assert float(seconds) < 120
