"""What crossbatch does for a small model: passkey, perplexity and cost, before and after some minutes of training.

    python recipes/longllama/evidence.py MODEL DATA OUT                       everything, one step after the other
    python recipes/longllama/evidence.py MODEL DATA OUT --only train passkey  some steps

MODEL is the folder of SmolLM2-135M with its tokenizer (small.yaml's memory layers are its), DATA what `oncelm train`
reads: long documents, with held-out ones in json/valid.json. Each step leaves its files in OUT; stopped at any moment,
the same command goes on, and a step that fails does not keep the others from running. Steps:

    before   OUT/untrained: MODEL as LongLLaMA with small.yaml's windows and memory layers; passkey of it and of MODEL
    train    OUT/first: small.yaml for half of --seconds; OUT/trained: from there with long memories
    passkey  of OUT/trained/model
    focus    the share of attention that finds the pass key in memory, untrained and trained, by length
    nll      perplexity of held-out documents with ever more of them in memory, untrained and trained
    knn      memory searched by Faiss, in CPU memory and exact: recall, seconds to read and to write a token
    bench    prefill and decoding beside plain Llama with a full cache: tokens/s and peak memory
    facts    OUT/facts: from OUT/trained for --facts-seconds on DATA with facts hidden in it and asked for later
             (recipes/needles/build.py; no pass keys among them); passkey and perplexity of it
    report   OUT/report.html: passkey and perplexity of all
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention import key_attention

import oncelm
from oncelm.data.layout import find_corpus
from oncelm.data.tokens import is_token_folder
from oncelm.eval.codec import Codec
from oncelm.eval.documents import read_documents
from oncelm.eval.task import parse_tokens
from oncelm.eval.tasks.passkey import Passkey
from oncelm.train.config import TrainConfig
from oncelm.utils.device import resolve_device
from oncelm.utils.environment import environment_report
from oncelm.utils.files import atomic_file, atomic_folder

RECIPE = Path(__file__).with_name("small.yaml")
FIRST = 1 / 8  # of the time, with short memories
LONG_MEMORY = ("crossbatch_rows=64", "model_overrides.cross_batch_range=63", "batch_size=64")  # see docs/longllama.md
LONG_LR, FACTS_LR = "lr=3e-4", "lr=1e-4"
TOKENS_A_FACT = 341  # of a row, at least
BUILD_FACTS = Path(__file__).parents[1] / "needles" / "build.py"
FOCUS_TRIALS, DECODED = 5, 16  # texts of each length in focus; tokens in a timing of knn


def call(*arguments: str | Path) -> None:
    """`oncelm ...`, which shows what it does."""
    command = [sys.executable, "-m", "oncelm", *map(str, arguments)]
    print("+", *command[2:], flush=True)
    subprocess.run(command, check=True)


class Evidence:
    """The steps; each may be run again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.untrained, self.trained = args.out / "untrained", args.out / "trained" / "model"
        self.device = resolve_device(args.device)
        on_gpu = self.device.type == "cuda"
        self.precision, self.compile = ("bfloat16", ("--compile",)) if on_gpu else ("float32", ())

    def ask(self, task: str, model: Path, name: str, *options: str) -> None:
        """An evaluation, into OUT/TASK-NAME.jsonl."""
        where = ("--device", str(self.device), "--dtype", self.precision, "--out", self.out / f"{task}-{name}.jsonl")
        # transformers' own models are not compiled here
        compiled = () if model == self.args.model else self.compile
        call("eval", task, model, *options, *compiled, *where)

    def find_passkeys(self, model: Path, name: str, lengths: str, *options: str) -> None:
        self.ask("passkey", model, name, "--lengths", lengths, "--trials", str(self.args.trials), *options)

    def before(self) -> None:
        if not self.untrained.exists():
            settings = TrainConfig.from_yaml(RECIPE, self.args.set, data="-", out="-").model_overrides
            keys = ("mem_layers", "max_position_embeddings", "last_context_length")
            model = oncelm.load(self.args.model, "cpu", **{key: settings[key] for key in keys})
            with atomic_folder(self.untrained) as folder:
                model.save_pretrained(folder)
                oncelm.load_tokenizer(self.args.model).save_pretrained(folder)
        self.find_passkeys(self.untrained, "untrained", self.args.lengths)
        self.find_passkeys(self.args.model, "llama", self.args.plain_lengths, "--beyond-trained-length")

    def train(self) -> None:
        first = self.train_from(self.args.model, self.args.data, "first", FIRST * self.args.seconds)
        self.train_from(first, self.args.data, "trained", (1 - FIRST) * self.args.seconds, *LONG_MEMORY, LONG_LR)

    def train_from(self, model: Path, data: str | Path, name: str, seconds: float, *more: str) -> Path:
        """small.yaml into OUT/NAME, unless it is there; the folder of the model."""
        out = self.out / name
        if not (out / "finished").exists():
            settings = (*more, f"max_seconds={seconds}", f"device={self.device}")
            settings += () if self.compile else ("compile=false",)
            call(
                *("train", data, "--model", model, "--out", out, "--config", RECIPE, "--resume"),
                *("--set", *settings, *self.args.set),
            )
            if not (out / "finished").exists():
                raise RuntimeError(f"{out} was stopped before its end")
        return out / "model"

    def facts(self) -> None:
        if not self.trained.is_dir():
            raise ValueError(f"{self.trained} is not there; it is what `train` makes.")
        settings = TrainConfig.from_yaml(RECIPE, [*LONG_MEMORY, *self.args.set], data="-", out="-")
        length = settings.crossbatch_rows * (settings.seq_len - 1) + 1  # of a piece; rows share a token
        rows = self.out / "rows"
        options = ("--tokenizer", self.args.model, "--leave-out", "pass key", "--drill")
        options += ("--tokens", f"{length}:{self.args.facts_tokens}", "--facts", str(-(-length // TOKENS_A_FACT)))
        subprocess.run([*map(str, (sys.executable, BUILD_FACTS, self.args.data, rows, *options))], check=True)
        rows /= str(length)
        model = self.train_from(self.trained, rows, "facts", self.args.facts_seconds, *LONG_MEMORY, FACTS_LR)
        self.find_passkeys(model, "facts", self.args.lengths)
        self.ask("context-nll", model, "facts", "--documents", self.held_out(), "--contexts", self.args.contexts)

    def passkey(self) -> None:
        self.find_passkeys(self.trained, "trained", self.args.lengths)

    def focus(self) -> None:
        """One line a model and length: for each memory layer, the mean of a few trials."""
        lines = []
        lengths = tuple(map(parse_tokens, self.args.lengths.split(",")))
        for folder, name in ((self.untrained, "untrained"), (self.trained, "trained")):
            model = oncelm.load(folder, self.device, self.precision)
            codec = Codec(oncelm.load_tokenizer(folder))
            for length in lengths:
                task = Passkey(lengths=(length,), trials=min(FOCUS_TRIALS, self.args.trials))
                shares = [key_attention(model, codec, example) for example in task.examples(codec, seed=0)]
                means = [round(sum(layer) / len(layer), 4) for layer in zip(*shares, strict=True)]
                lines.append(
                    {
                        "model": name,
                        "length": length,
                        "share": dict(zip(sorted(model.config.mem_layers), means, strict=True)),
                    }
                )
                print(json.dumps(lines[-1]), flush=True)
        self.write("focus", lines)

    def nll(self) -> None:
        documents = self.held_out()
        for model, name in ((self.untrained, "untrained"), (self.trained, "trained")):
            self.ask("context-nll", model, name, "--documents", documents, "--contexts", self.args.contexts)

    def held_out(self) -> str:
        """--documents; else those that DATA holds out, as one file; a bundled book where it holds out none."""
        if self.args.documents is not None:
            return self.args.documents
        corpus = None if is_token_folder(self.args.data) else find_corpus(self.args.data)
        if corpus is None or not corpus.valid:
            return "moby_dick"
        file = self.out / "held-out" / "documents.jsonl"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
                for path in (path for source in corpus.valid for path in source.files):
                    lines.writelines(json.dumps({"text": one.text}) + "\n" for one in read_documents(str(path)))
        return str(file)

    def bench(self) -> None:
        for benchmark in ("prefill", "decode"):
            file = self.out / f"{benchmark}.jsonl"
            file.unlink(missing_ok=True)  # of a run that was stopped
            call(
                *("bench", benchmark, "--model", self.trained, "--lengths", self.args.bench_lengths),
                *("--peer-max-length", str(max(map(int, self.args.bench_lengths.split(","))))),
                *("--repeats", "2", "--device", str(self.device), "--dtype", self.precision, "--out", file),
            )

    @torch.no_grad()
    def knn(self) -> None:
        """One line a kind of memory; the first, exact, is what the others are compared with."""
        model = oncelm.load(self.trained, self.device, self.precision)
        tokenizer, (document, *_) = oncelm.load_tokenizer(self.trained), read_documents(self.held_out())
        ids = tokenizer(document.text, return_tensors="pt").input_ids[:, : self.args.knn_length].to(self.device)
        indexes = ("flat", "ivf", "hnsw") if importlib.util.find_spec("faiss") else ()
        if not indexes:
            print("knn needs Faiss (pip install 'oncelm[knn]'): measuring the other memories only")
        kinds: list[dict[str, Any]] = [{"memory": "exact"}, {"memory": "cpu"}]
        kinds += [{"memory": "knn", "index": index, "top_k": 128} for index in indexes]
        lines, expected = [], None
        for kind in kinds:
            measured = {"measure_recall": True} if kind["memory"] == "knn" else {}
            read, wrote, logits, _ = self.read_and_write(model, ids, kind)
            recall = self.read_and_write(model, ids, kind | measured)[3] if measured else {}
            expected = logits if expected is None else expected
            difference = torch.nn.functional.kl_div(logits, expected, log_target=True, reduction="batchmean").item()
            line = {**kind, "tokens": ids.shape[1], "read_seconds": read, "seconds_a_token": wrote}
            lines.append({**line, "recall": recall, "kl_to_exact": difference})
            print(json.dumps(lines[-1]), flush=True)
        self.write("knn", lines)

    def write(self, name: str, lines: list[dict[str, Any]]) -> None:
        """OUT/NAME.jsonl, with what it was measured on."""
        common = {"benchmark": f"longllama_{name}", "environment": environment_report()}
        with atomic_file(self.out / f"{name}.jsonl") as file:
            file.write_text("".join(json.dumps(common | line) + "\n" for line in lines), encoding="utf-8")

    def read_and_write(
        self, model: Any, ids: torch.Tensor, kind: dict[str, Any]
    ) -> tuple[float, float, torch.Tensor, dict[int, float]]:
        """Seconds to read ids, for a token behind them, the first one's log-probabilities, and recall by layer."""
        cache = model.new_cache(1, ids.shape[1] + DECODED, **kind)
        times = [self.now()]
        logits = model.prefill(ids, cache)
        times.append(self.now())
        first = logits.float().log_softmax(-1)  # greedy texts part where memories differ; until here they are the same
        for _ in range(DECODED):
            logits = model(logits.argmax(-1, keepdim=True), past_key_values=cache, logits_to_keep=1).logits[:, -1]
        times.append(self.now())
        read, wrote = times[1] - times[0], (times[2] - times[1]) / DECODED
        return read, wrote, first, cache.recall()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def report(self) -> None:
        runs = sorted([*self.out.glob("passkey-*.jsonl"), *self.out.glob("context-nll-*.jsonl")])
        call("eval", "report", *runs, "--out", self.out / "report.html", "--title", "LongLLaMA, small")


STEPS: tuple[Callable[[Evidence], None], ...] = (
    *(Evidence.before, Evidence.train, Evidence.passkey, Evidence.focus, Evidence.nll, Evidence.knn, Evidence.bench),
    *(Evidence.facts, Evidence.report),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("out", metavar="OUT", type=Path)
    names = [step.__name__ for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help="these steps (all)")
    parser.add_argument("--seconds", type=float, default=760, help="of training (760)")
    parser.add_argument("--facts-seconds", type=float, default=170, help="of training with facts (170)")
    parser.add_argument("--facts-tokens", default="24M", metavar="N", help="of text with facts to build (24M)")
    parser.add_argument("--lengths", default="4K,8K,16K,32K,64K,128K", help="of passkey (4K to 128K)")
    parser.add_argument("--plain-lengths", default="4K,8K,16K,32K", help="of passkey on MODEL as it is (4K to 32K)")
    parser.add_argument("--trials", type=int, default=20, help="of passkey, at each length (20)")
    parser.add_argument("--contexts", default="8K,32K,128K", help="of nll (8K,32K,128K, and none)")
    parser.add_argument("--documents", metavar="PATH", help="long texts for nll and knn (what DATA holds out)")
    parser.add_argument("--bench-lengths", default="131072,524288", help="of bench (131072,524288)")
    parser.add_argument("--knn-length", type=int, default=32768, help="tokens in memory for knn (32768)")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replace settings of small.yaml")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    evidence, failed = Evidence(args), []
    for step in STEPS:
        done = args.out / f"{step.__name__}.done"
        if step.__name__ not in args.only or done.exists():
            continue
        started = time.perf_counter()
        try:
            step(evidence)
        except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{step.__name__} failed: {error}", file=sys.stderr, flush=True)
            failed.append(step.__name__)
            continue
        done.write_text(f"{time.perf_counter() - started:.1f} s\n")
        print(f"{step.__name__}: {done.read_text().strip()}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
