"""Llama, YOCO with sliding windows and YOCO with gated retention: equal sizes, the same data, the same schedule.

    python recipes/compare/run.py DATA OUT                  all three, one after the other, then the plot
    python recipes/compare/run.py DATA OUT --seconds 900    stop after a quarter of an hour; the same command goes on

DATA is anything that `oncelm train` reads, with at least 100M tokens. Each model has about 38M parameters without
embeddings and sees 105M tokens: some minutes each on one large GPU. OUT gets a folder a model, curves.png with the
three losses, and summary.jsonl with a line a model.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).with_name("recipe.yaml")
LABELS = {"llama": "Llama", "yoco-swa": "YOCO, sliding window", "yoco-gret": "YOCO, gated retention"}
WIDTH, LAYERS, HEADS, WINDOW = 512, 12, 8, 256
_HEADS = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
_YOCO = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, **_HEADS}
_HALVES = {"num_self_decoder_layers": LAYERS // 2, "num_cross_decoder_layers": LAYERS // 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama-small",
        {
            **{"hidden_size": WIDTH, "intermediate_size": 1408, "num_hidden_layers": LAYERS},  # 8/3 d, by 128
            **_HEADS,
        },
    ),
    "yoco-swa": (
        "yoco-small",
        _YOCO | _HALVES | {"self_decoder": "sliding_window", "window_size": WINDOW, "num_self_heads": HEADS},
    ),
    "yoco-gret": ("yoco-small", _YOCO | _HALVES | {"num_self_heads": WIDTH // 256}),
}


def command(name: str, data: str, out: Path, settings: list[str]) -> list[str]:
    """`oncelm train` of one of the models; it goes on where it was stopped."""
    preset, shape = SHAPES[name]
    overrides = [f"model_overrides.{key}={value}" for key, value in shape.items()]
    return [
        *(sys.executable, "-m", "oncelm", "train", data, "--out", str(out / name), "--model", preset, "--resume"),
        *("--config", str(RECIPE), "--set", *overrides, *settings),
    ]


def train(name: str, data: str, out: Path, settings: list[str], deadline: float) -> bool:
    """Train one model until it is finished or the time is up, which saves it; whether it is finished."""
    if (out / name / "finished").exists():
        return True
    process = subprocess.Popen(command(name, data, out, settings))
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        if status == -signal.SIGTERM:  # it had not begun to train
            return False
    except KeyboardInterrupt:
        process.wait()  # it has had the signal too, and saves
        raise SystemExit(130) from None
    if status:
        raise SystemExit(status)
    return (out / name / "finished").exists()


def read_curve(out: Path, name: str, value: str) -> tuple[list[int], list[float]]:
    """(tokens seen, value) of a model's metrics.jsonl, as far as it is."""
    file = out / name / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    tokens_per_step = next((line["tokens"] / line["step"] for line in lines if "tokens" in line), 0)
    found = [line for line in lines if value in line]
    return [round(line["step"] * tokens_per_step) for line in found], [line[value] for line in found]


def plot(out: Path) -> None:
    """curves.png: training loss (mean of the last 20 logs) and held-out loss against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, value, title in zip(
        figure.subplots(1, 2), ("loss", "validation_loss"), ("training loss", "held-out loss"), strict=True
    ):
        for name, label in LABELS.items():
            tokens, losses = read_curve(out, name, value)
            if value == "loss":
                windows = [losses[max(0, i - 19) : i + 1] for i in range(len(losses))]
                losses = [sum(window) / len(window) for window in windows]
            axes.plot([count / 1e6 for count in tokens], losses, label=label, marker="." if value != "loss" else "")
        axes.set(title=title, xlabel="million tokens", ylabel="nats a token")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out / "curves.png", dpi=120)


def summarize(out: Path) -> None:
    """summary.jsonl, and the same as text."""
    lines = []
    for name, label in LABELS.items():
        tokens, losses = read_curve(out, name, "validation_loss")
        if losses:
            rates = read_curve(out, name, "tokens_per_second")[1]
            lines.append({"model": label, "tokens": tokens[-1], "validation_loss": losses[-1]})
            lines[-1] |= {
                "finished": (out / name / "finished").exists(),
                "tokens_per_second": sorted(rates)[len(rates) // 2],
            }
            print(f"{label:<24} held-out loss {losses[-1]:.4f} after {tokens[-1]:,} tokens")
    (out / "summary.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all three (as long as it takes)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replace settings of all three")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + min(args.seconds, 1e9)
    unfinished = []
    for name in SHAPES:
        if unfinished or not train(name, args.data, args.out, args.set, deadline):
            unfinished.append(name)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(args.out)
    summarize(args.out)
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}; the same command goes on.")


if __name__ == "__main__":
    main()
