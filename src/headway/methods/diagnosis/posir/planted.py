"""Encoders whose position bias is known, to stand beside a real one: words are hashed to a few places with
random signs, and pooled.

    e = Σ_t w_t h(word_t) / Σ_t w_t ,    w_t = exp(−decay · t / n) for t < keep, else 0

`decay` 0 is free of position, above 0 prefers the start (primacy), below 0 the end (recency); `keep` reads the first
words only. Queries are pooled evenly and read whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError
from headway.tasks.bm25 import words

#: Places of one word in an embedding.
PLACES = 4


@dataclass(kw_only=True)
class WordEncoder:
    """Hashed words with a planted position bias. `max_tokens` is the number of words read (None: all)."""

    decay: float = 0.0
    max_tokens: int | None = None
    width: int = 8192
    name: str = ""

    def __post_init__(self) -> None:
        if self.width < 8 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ArgumentError(f"width, max_tokens: got {self.width} and {self.max_tokens}, expected 8 and 1 or more.")
        bias = f" decay {self.decay:g}" if self.decay else ""
        self.name = self.name or f"words{bias}{f' first {self.max_tokens}' if self.max_tokens else ''}"

    @property
    def identity(self) -> str:
        return f"words {self.decay} {self.max_tokens} {self.width}"

    def encode(self, texts: Sequence[str], *, is_query: bool) -> Float[np.ndarray, "texts width"]:
        return np.stack([self._embedded(text, is_query) for text in texts])

    def _embedded(self, text: str, is_query: bool) -> Float[np.ndarray, " width"]:
        found = words(text)
        total = len(found)
        if self.max_tokens is not None and not is_query:
            found = found[: self.max_tokens]
        if not found:
            return np.zeros(self.width, dtype=np.float32)
        weight = np.ones(len(found)) if is_query else np.exp(-self.decay * np.arange(len(found)) / total)
        places, signs = (np.stack(side) for side in zip(*(_hashed(word, self.width) for word in found), strict=True))
        values = (weight / weight.sum())[:, None] * signs
        return np.bincount(places.ravel(), weights=values.ravel(), minlength=self.width).astype(np.float32)


def word_tokens(text: str, **_: object) -> dict[str, list[Any]]:
    """Words as `WordEncoder` counts them, in the form that `count_tokens` takes from a tokenizer."""
    spans = [match.span() for match in re.finditer(r"\w+", text.lower())]
    return {"input_ids": list(range(len(spans))), "offset_mapping": spans}


@lru_cache(maxsize=200_000)
def _hashed(word: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed random places of a word, and their signs."""
    seed = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    random = np.random.default_rng(seed)
    return random.integers(width, size=PLACES), random.choice(np.array([-1.0, 1.0]), size=PLACES)
