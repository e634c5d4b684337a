"""What float8 products change: logits of a model with random weights, and of a trained one on held-out text.

    python benchmarks/float8_accuracy.py MODEL --out results.jsonl

MODEL is a folder with a tokenizer, trained on earlier State of the Union addresses; the held-out text are those from
2000 on. The reference is the same model multiplied exactly, in the same dtype. Works on a CPU too, where torch computes
the same float8 products slowly.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from oncelm import bench, load, load_tokenizer
from oncelm.data.corpora import load_corpus
from oncelm.models import YocoForCausalLM
from oncelm.models.yoco import execution
from oncelm.utils.environment import environment_report

TOKENS, TEXTS = 512, 16
FIRST_HELD_OUT_YEAR = 2000


@torch.no_grad()
def compare(model: YocoForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Relative error of the logits [B, T, V], share of equal most likely tokens, and both losses."""
    exact = model.set_quantization(None)(ids, use_cache=False).logits.float()
    rounded = model.set_quantization("float8")(ids, use_cache=False).logits.float()
    targets = ids[:, 1:].flatten()
    return {
        "logit_error": ((rounded - exact).norm() / exact.norm()).item(),
        "argmax_agreement": (rounded.argmax(-1) == exact.argmax(-1)).double().mean().item(),
        "loss": F.cross_entropy(exact[:, :-1].flatten(0, 1), targets).item(),
        "loss_float8": F.cross_entropy(rounded[:, :-1].flatten(0, 1), targets).item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        execution.check_float8 = lambda device, dtype: None  # it is refused there because it is slow
    trained = load(args.model, args.device, "bfloat16")
    text = "\n\n".join(document.text for document in load_corpus("sotu", first_year=FIRST_HELD_OUT_YEAR))
    ids = load_tokenizer(args.model)(text, verbose=False, return_tensors="pt").input_ids[0, : TEXTS * TOKENS]
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(trained.config, dtype=torch.bfloat16).eval().to(args.device)
    for name, model in (("random weights", fresh), ("trained", trained)):
        record = {
            "benchmark": "float8 accuracy",
            "weights": name,
            "shape": {key: getattr(model.config, key) for key in model.config.own_keys()},
            "dtype": "bfloat16",
            "tokens": TEXTS * TOKENS,
            **compare(model, ids.view(TEXTS, TOKENS).to(args.device)),
            "device": args.device,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment_report(),
        }
        bench.append_record(args.out, record)
        print({key: value for key, value in record.items() if key not in ("shape", "environment")})


if __name__ == "__main__":
    main()
