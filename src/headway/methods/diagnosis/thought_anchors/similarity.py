"""Whether two sentences say the same: the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from headway.door.evaluating import evaluating
from headway.errors import ArgumentError

#: Sentences -> one vector each.
Encoder = Callable[[Sequence[str]], Float[np.ndarray, "sentences width"]]
#: Cosine below which a resampled sentence counts as different, and from which a rollout contains a sentence.
DIFFERENT_BELOW, CONTAINED_FROM = 0.8, 0.8
BATCH = 32


def sentence_encoder(model: nn.Module | None = None, tokenizer: Any = None) -> Encoder:
    """Mean-pooled, normalised vectors of a text encoder; the embedded MiniLM by default."""
    if model is None:
        from headway.hosts import load

        model, tokenizer = load("minilm")
    host: Any = model

    @torch.no_grad()
    def encode(sentences: Sequence[str]) -> np.ndarray:
        parts = []
        with evaluating(host):
            for start in range(0, len(sentences), BATCH):
                batch = tokenizer(
                    list(sentences[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt"
                )
                hidden = host(**batch).last_hidden_state
                real = batch["attention_mask"][..., None].to(hidden.dtype)
                parts.append((hidden * real).sum(1) / real.sum(1).clamp(min=1))
        pooled = torch.cat(parts) if parts else torch.zeros(0, 1)
        return torch.nn.functional.normalize(pooled, dim=-1).numpy(force=True)

    return encode


def exact_encoder(sentences: Sequence[str]) -> Float[np.ndarray, "sentences width"]:
    """Sentences are the same when their words are: one axis for each distinct sentence. For generated toy texts."""
    plain = [" ".join(s.split()) for s in sentences]
    names = {name: i for i, name in enumerate(dict.fromkeys(plain))}
    return np.eye(len(names))[[names[p] for p in plain]] if plain else np.zeros((0, 1))


def cosines(encoder: Encoder, sentence: str, others: Sequence[str]) -> Float[np.ndarray, " others"]:
    """Cosine of each of `others` with `sentence`; each distinct text is encoded once."""
    distinct = list(dict.fromkeys([sentence, *others]))
    vectors = np.asarray(encoder(distinct), dtype=float)
    if vectors.ndim != 2 or len(vectors) != len(distinct):
        raise ArgumentError(
            f"encoder: got shape {vectors.shape} for {len(distinct)} sentences, expected one vector each."
        )
    size = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(size > 0, size, 1)
    found = dict(zip(distinct, unit @ unit[0], strict=True))
    return np.array([found[o] for o in others])
