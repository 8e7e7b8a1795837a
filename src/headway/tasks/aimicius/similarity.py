"""How alike two texts are, in [0, 1]: by hashed character n-grams, or by an encoder that is given.

sim(a, b) = max(0, cos(h(a), h(b))) ,   h(x)_m = number of n-grams of x whose hash is m
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from headway.errors import ArgumentError

Similarity = Callable[[str, str], float]

#: Lengths of the n-grams, and the number of places their hashes fall into.
LENGTHS, PLACES = (2, 3, 4), 4096


def ngram_similarity(first: str, second: str) -> float:
    """Cosine of the counts of hashed character n-grams; white space counts as one blank. Two empty texts are equal."""
    counts = [_ngrams(text) for text in (first, second)]
    if not counts[0] or not counts[1]:
        return float(first.split() == second.split())
    product = sum(number * counts[1][place] for place, number in counts[0].items())
    sizes = [sum(number * number for number in count.values()) for count in counts]
    return min(product / (sizes[0] * sizes[1]) ** 0.5, 1.0)


def embedding_similarity(model: Any, tokenizer: Any) -> Similarity:
    """Cosine of mean-pooled token states, as all-MiniLM-L6-v2 is used: `embedding_similarity(*headway.load("minilm"))`.

    Texts are cut at the length the encoder takes. Negative cosines count as 0."""
    if not hasattr(model, "forward") or not callable(tokenizer):
        raise ArgumentError(
            f"model, tokenizer: got {type(model).__name__} and {type(tokenizer).__name__}, expected an encoder and its "
            'tokenizer. Pass both results of headway.load("minilm").'
        )

    def compare(first: str, second: str) -> float:
        if not first.strip() or not second.strip():
            return float(first.split() == second.split())
        batch = tokenizer([first, second], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        real = batch["attention_mask"][..., None].to(states.dtype)
        pooled = (states * real).sum(1) / real.sum(1)
        return min(max(float(torch.cosine_similarity(pooled[0], pooled[1], dim=0)), 0.0), 1.0)

    return compare


def _ngrams(text: str) -> Counter[int]:
    text = f" {' '.join(text.split())} " if text.strip() else ""
    return Counter(
        zlib.crc32(text[start : start + length].encode()) % PLACES
        for length in LENGTHS
        for start in range(len(text) - length + 1)
    )
