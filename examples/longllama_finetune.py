"""Turn a LLaMA-family model into a LongLLaMA: fine-tune it with crossbatch on a folder of long documents.

    oncelm convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    python examples/longllama_finetune.py smollm2 books/ --out runs/long --mem-layers 8,16,24 --steps 200
    oncelm generate --model runs/long/model --prompt-file book.txt

DATA is whatever `oncelm train` takes: text files (each a document), JSONL, Parquet. Rows are windows of --window
tokens, four of a document in each batch: the mix of positives and negatives of the paper (docs/longllama.md).
"""

from __future__ import annotations

import argparse

import oncelm
from oncelm.cli.generate import parse_layers
from oncelm.data.crossbatch import DocumentBatches, documents_of
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import prepare
from oncelm.data.tokens import open_tokens
from oncelm.train.config import TrainConfig
from oncelm.train.trainer import Trainer

PACKING, RANGE = 4, 3  # (positives, negatives): (0,0) (1,1) (2,1) (3,0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a LLaMA-family model with its tokenizer")
    parser.add_argument("data", help="a text file or a folder of them, JSONL or Parquet")
    parser.add_argument("--out", required=True)
    parser.add_argument("--mem-layers", required=True, metavar="I,J,...")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8, help=f"rows in one forward pass, a multiple of {PACKING}")
    parser.add_argument("--grad-accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-seconds", type=float)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--held-out", type=int, default=0, help="documents for validation, the last ones")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, a third more time")
    args = parser.parse_args()

    tokenizer = oncelm.load_tokenizer(args.model)
    model = oncelm.load(
        args.model,
        dtype="float32",
        mem_layers=parse_layers(args.mem_layers),
        max_position_embeddings=args.window,
        cross_batch_range=RANGE,
        cross_batch_stepping=True,
        dataset_packing=PACKING,
    )
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    folder = prepare(find_corpus(args.data), tokenizer, bos=tokenizer.bos_token_id is not None)
    documents = [document for source in open_tokens(folder).train for document in documents_of(source.stream)]
    batches = DocumentBatches(documents, args.window, PACKING, min_tokens=2 * args.window, held_out=args.held_out)
    config = TrainConfig(
        data=args.data,
        out=args.out,
        model=args.model,
        seq_len=args.window,
        batch_size=args.batch_size,
        grad_accumulation=args.grad_accumulation,
        steps=args.steps,
        max_seconds=args.max_seconds,
        lr=args.lr,
        schedule="constant",
        warmup_steps=10,
        weight_decay=0.01,
        dtype=args.dtype,
        log_every=10,
        eval_every=None,
    )
    print(Trainer(model, batches, config, tokenizer).fit())


if __name__ == "__main__":
    main()
