"""BM25: which sentences share words with a question. The lexical baseline of retrieval inside a long text.

    score(s) = Σ_{t in question} idf(t) · f(t, s) / ( f(t, s) + k₁ (1 − b + b |s| / mean |s|) )

f counts a word in a sentence; words are lower-case runs of letters, digits and underscores. k₁ = 1.5 and b = 0.75 are
the usual values (Robertson & Zaragoza 2009). Scores come from bm25s (extra `retrieval`), with its default idf.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError, missing_extra

K1, B = 1.5, 0.75


def bm25_scores(sentences: Sequence[str], question: str) -> Float[np.ndarray, " sentences"]:
    """A score of every sentence for a question; 0 where they share no word."""
    try:
        from bm25s import BM25
    except ImportError as error:
        raise missing_extra("bm25s", "retrieval", "BM25") from error
    corpus = [words(sentence) for sentence in sentences]
    asked = words(question)
    if not asked or not any(corpus):
        return np.zeros(len(corpus))
    # A stand-in keeps sentences without a word in the index; no question holds it.
    index = BM25(k1=K1, b=B)
    index.index([found or ["\0"] for found in corpus], show_progress=False)
    return np.asarray(index.get_scores(asked), dtype=float)


def bm25_keep(sentences: Sequence[str], question: str, tokens: Sequence[int], budget: int) -> list[int]:
    """The numbers of the best sentences, in their order in the text, that fit into `budget` tokens together.

    `tokens` are those of each sentence. Equal scores go to the earlier sentence; one that does not fit any more is
    passed over. Sentences that share no word with the question fill what is left, from the first one on."""
    if len(tokens) != len(sentences):
        raise ArgumentError(f"tokens: got {len(tokens)} counts for {len(sentences)} sentences, expected one each.")
    order = np.argsort(-bm25_scores(sentences, question), kind="stable")
    kept, left = [], budget
    for number in map(int, order):
        if tokens[number] <= left:
            kept.append(number)
            left -= tokens[number]
    return sorted(kept)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
