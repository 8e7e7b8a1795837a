"""BM25 against its formula on a small corpus, and what it keeps of a text."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from headway.errors import ArgumentError, MissingExtraError
from headway.tasks.bm25 import K1, B, bm25_keep, bm25_scores, words

SENTENCES = ("The cat sat.", "A dog ran, and ran!", "The cat and the dog.", "", "...")


def test_scores_are_the_formula():
    corpus = [words(sentence) or ["\0"] for sentence in SENTENCES]
    mean = np.mean([len(found) for found in corpus])
    scores = bm25_scores(SENTENCES, "Dog RAN?")
    for number, found in enumerate(corpus):
        wanted = 0.0
        for word in ("dog", "ran"):
            holders = sum(word in other for other in corpus)
            idf = np.log(1 + (len(corpus) - holders + 0.5) / (holders + 0.5))
            count = found.count(word)
            wanted += idf * count / (count + K1 * (1 - B + B * len(found) / mean))
        assert scores[number] == pytest.approx(wanted, rel=1e-5)


def test_words_that_no_sentence_holds_score_nothing():
    assert bm25_scores(SENTENCES, "zebra").tolist() == [0] * 5
    assert bm25_scores(SENTENCES, "?").tolist() == [0] * 5
    assert bm25_scores(["", "."], "cat").tolist() == [0, 0]
    assert bm25_scores([], "cat").tolist() == []


def test_the_best_sentences_that_fit_are_kept_in_order():
    sizes = [4, 6, 6, 1, 1]
    assert bm25_keep(SENTENCES, "dog cat", sizes, 6) == [2]
    assert bm25_keep(SENTENCES, "dog cat", sizes, 11) == [0, 2, 3]
    assert bm25_keep(SENTENCES, "zebra", sizes, 5) == [0, 3]
    assert bm25_keep([], "dog", [], 5) == []


def test_counts_belong_to_sentences():
    with pytest.raises(ArgumentError, match="tokens: got 1 counts for 2 sentences"):
        bm25_keep(["a", "b"], "a", [1], 5)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"headway\[retrieval\]"):
        bm25_scores(SENTENCES, "cat")
