"""What the causal matrix of Thought Anchors costs: n sentences against n + 2 plain forwards of the same text.

The bar is a ratio of at most 1. Sharing the prefix leaves about half a forward for each sentence, of which the door's
masks and the divergences over the whole vocabulary take some back.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from benchmarks.harness import compare
from headway.hosts import default_text, load, tokenize
from headway.methods.diagnosis.thought_anchors import suppression_matrix

TOKENS, SENTENCES = 256, 16


def anchors_suppression(tokens: int = TOKENS, sentences: int = SENTENCES, repeats: int = 3) -> None:
    """SmolLM2 on `tokens` tokens in `sentences` sentences of one length."""
    model, tokenizer = load("smollm2")
    ids = tokenize(tokenizer, default_text(), tokens)
    spans = list(pairwise(np.linspace(0, tokens, sentences + 1).astype(int).tolist()))

    def plain() -> None:
        with torch.no_grad():
            for _ in range(sentences + 2):
                model(input_ids=ids, use_cache=False)

    compare(
        "anchors_suppression",
        method=lambda: suppression_matrix(model, ids, spans),
        baseline=plain,
        labels=("suppression matrix", f"{sentences + 2} plain forwards"),
        repeats=repeats,
        settings={"model": "smollm2", "tokens": tokens, "sentences": sentences},
    )


if __name__ == "__main__":
    anchors_suppression()
