"""Sentences of a text, as ranges of characters and of tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from headway.errors import ArgumentError

#: Shorter sentences join their neighbour (Thought Anchors, arXiv 2506.19143).
SHORTEST_SENTENCE = 10


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character ranges of the sentences, which join to the whole text.

    A sentence ends at `.`, `?` or `!` before white space, or at a blank line, and takes that white space along. Ones
    shorter than SHORTEST_SENTENCE join the next, the last one the one before. Text after the last mark is kept."""
    ends = [m.end() for m in re.finditer(r"[.?!]\s+|\n[^\S\n]*\n\s*", text)]
    spans: list[tuple[int, int]] = []
    start = 0
    for end in dict.fromkeys([*ends, len(text)]):
        if len(text[start:end].strip()) >= SHORTEST_SENTENCE:
            spans.append((start, end))
            start = end
    if start < len(text):
        spans = [*spans[:-1], (spans[-1][0], len(text))] if spans else [(0, len(text))]
    return spans


def sentence_spans(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Token ranges of the sentences of `text`, from the (start, stop) characters of its tokens.

    A token belongs to the sentence of its last character; empty ones (special tokens) to none. Sentences that own no
    token are left out. Raises ArgumentError when the offsets do not run forward through the text."""
    places = [(i, stop - 1) for i, (start, stop) in enumerate(offsets) if stop > start]
    characters = [c for _, c in places]
    if characters != sorted(characters) or (characters and characters[-1] >= len(text)):
        raise ArgumentError(
            "offsets: got character ranges that run backwards or beyond the text, expected those of one text. Pass the "
            "offset_mapping of the tokenizer for this very text, or use piece_offsets."
        )
    spans = []
    for start, stop in split_sentences(text):
        first, after = bisect_left(characters, start), bisect_left(characters, stop)
        if first < after:
            spans.append((places[first][0], places[after - 1][0] + 1))
    return spans


def piece_offsets(pieces: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Text and offsets from the text of each token, for tokenizers without an offset map."""
    ends = np.cumsum([len(p) for p in pieces], dtype=int).tolist()
    return "".join(pieces), list(zip([0, *ends], ends, strict=False))
