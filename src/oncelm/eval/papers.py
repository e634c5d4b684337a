"""What the two papers report, for the rows beside one's own. Figures that they show as curves only are not here."""

from __future__ import annotations

YOCO = "arXiv 2405.05254"
LONGLLAMA = "arXiv 2307.03170"

# Accuracy at 128K by number of needles (YOCO).
MULTI_NEEDLE_128K = {
    "GPT-4-128K": {1: 1.00, 2: 1.00, 4: 0.98, 8: 1.00},
    "MiniCPM-128K (2.4B)": {1: 1.00, 2: 1.00, 4: 0.54, 8: 0.56},
    "ChatGLM3-128K (6B)": {1: 0.94, 2: 0.72, 4: 0.52, 8: 0.44},
    "YaRN-Mistral-128K (7B)": {1: 0.02, 2: 0.12, 4: 0.08, 8: 0.20},
    "LWM-1M-text (7B)": {1: 1.00, 2: 0.90, 4: 0.76, 8: 0.62},
    "YOCO-3B-1M": {1: 0.98, 2: 0.98, 4: 0.84, 8: 0.56},
}

# Loss of 160M models: all tokens, AR-hit, first occurrence (YOCO).
ABLATIONS_160M = {
    "Mamba": (3.645, 1.555, 4.126),
    "RetNet": (3.633, 1.466, 4.131),
    "Hybrid H3": (3.591, 1.251, 4.130),
    "gRetNet": (3.600, 1.354, 4.116),
    "Transformer": (3.564, 1.219, 4.104),
    "YOCO, sliding window": (3.553, 1.202, 4.094),
    "YOCO, gated retention": (3.530, 1.199, 4.067),
    "YOCO, 3 self : 1 cross": (3.526, 1.207, 4.060),
    "YOCO, 1 self : 3 cross": (3.565, 1.230, 4.102),
    "YOCO, 0 self : 1 cross": (3.898, 1.827, 4.374),
    "YOCO, unstacked": (3.531, 1.188, 4.071),
    "YOCO, interleaved": (3.542, 1.204, 4.081),
}

# In-context accuracy by prompt length in tokens (LongLLaMA, 20 trials).
TREC = {
    "LongLLaMA-3B": {2048: 0.670, 4096: 0.716, 6144: 0.729, 8192: 0.733},
    "LongLLaMA-7B": {2048: 0.632, 4096: 0.727, 6144: 0.749, 8192: 0.759},
}
WEBQS = {
    "LongLLaMA-3B": {2048: 0.212, 4096: 0.214, 6144: 0.222, 8192: 0.224},
    "LongLLaMA-7B": {2048: 0.255, 4096: 0.264, 6144: 0.272, 8192: 0.277},
}

# Passkey retrieval by prompt length in tokens (LongLLaMA; its 100 % up to 16K are a figure).
PASSKEY = {"LongLLaMA-3B": {100_000: 0.945, 256_000: 0.73}}

# lm-eval, zero-shot: ARC-c, ARC-e, BoolQ, HellaSwag (acc_norm), OBQA, PIQA, Winogrande, SciQ, average (YOCO).
YOCO_LM_EVAL: dict[str, tuple[float, ...]] = {
    "OpenLLaMA-3B-v2 (1T)": (0.339, 0.676, 0.657, 0.700, 0.260, 0.767, 0.629, 0.924, 0.619),
    "StableLM-base-alpha-3B-v2 (1T)": (0.324, 0.673, 0.646, 0.686, 0.264, 0.760, 0.621, 0.921, 0.612),
    "YOCO-3B (1T)": (0.379, 0.731, 0.645, 0.689, 0.298, 0.763, 0.639, 0.924, 0.634),
    "YOCO-3B (1.6T)": (0.396, 0.733, 0.644, 0.698, 0.300, 0.764, 0.631, 0.921, 0.636),
    "YOCO-3B-1M": (0.413, 0.747, 0.638, 0.705, 0.300, 0.773, 0.651, 0.932, 0.645),
}

# lm-eval, zero-shot: anli r1, r2, r3, arc_challenge acc, norm, arc_easy acc, norm, boolq, hellaswag acc, norm,
# openbookqa acc, norm, piqa acc, norm, record em, f1, rte, truthfulqa mc1, mc2, wic, winogrande, average (LongLLaMA).
LONGLLAMA_LM_EVAL: dict[str, tuple[float, ...]] = {
    "OpenLLaMA-3B": (
        0.33, 0.32, 0.35, 0.34, 0.37, 0.69, 0.65, 0.68, 0.49, 0.67, 0.27, 0.40, 0.75, 0.76, 0.88, 0.89, 0.58, 0.22,
        0.35, 0.48, 0.62, 0.53,
    ),
    "LongLLaMA-3B": (
        0.32, 0.33, 0.35, 0.34, 0.37, 0.68, 0.63, 0.68, 0.48, 0.65, 0.28, 0.38, 0.73, 0.75, 0.87, 0.87, 0.60, 0.24,
        0.38, 0.50, 0.60, 0.53,
    ),
}  # fmt: skip
