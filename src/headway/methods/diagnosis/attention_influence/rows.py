"""Texts on their way into a model: made readable, put together by length, padded on the right."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from headway.errors import ArgumentError

#: Share of characters that no text holds, above which a text is called none.
NOISE_SHARE = 0.05
#: A batch may hold this many times its real tokens, padding included.
PADDING = 1.2


def readable(text: str) -> tuple[str, bool]:
    """The text with halves of character pairs replaced by U+FFFD, and whether more than `NOISE_SHARE` of its characters
    are such, or control characters. Raises ArgumentError for anything but a string."""
    if not isinstance(text, str):
        raise ArgumentError(
            f"texts: got {type(text).__name__}, expected strings. Decode bytes first, with errors='replace' say."
        )
    if text.isascii() and text.isprintable():
        return text, False
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    noise = sum(c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\t\n\r\f") for c in clean)
    return clean, noise > NOISE_SHARE * len(clean)


def batches(rows: Sequence[tuple[int, list[int]]], most: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Rows of similar length together, long ones first: at most `most` tokens with padding, one row at least."""
    batch: list[tuple[int, list[int]]] = []
    real = 0
    for row in sorted(rows, key=lambda row: -len(row[1])):
        size = len(row[1])
        longest = len(batch[0][1]) if batch else size
        whole = (len(batch) + 1) * longest
        if batch and (whole > most or whole > PADDING * (real + size)):
            yield batch
            batch, real = [], 0
        batch.append(row)
        real += size
    if batch:
        yield batch


def padded(chunks: Sequence[Sequence[int]]) -> Int[Tensor, "rows tokens"]:
    """Rows padded on the right with their own first token: nothing reads it, and every model has it."""
    longest = max(len(chunk) for chunk in chunks)
    return torch.tensor([[*chunk, *[chunk[0]] * (longest - len(chunk))] for chunk in chunks])
