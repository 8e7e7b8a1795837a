"""Rankings and their measures against TREC's own evaluation; chunks, ties, and embeddings kept on disk."""

from __future__ import annotations

import numpy as np
import pytest

from headway.errors import ArgumentError, NumericError
from headway.methods.diagnosis.posir import (
    CallableEncoder,
    cosine_top,
    encoded,
    encoded_blocks,
    rank_scores,
    retrieval_measures,
    single_ndcg,
)
from headway.methods.diagnosis.posir.metrics import best_ranked

IDS = [f"doc{i}" for i in range(40)]
NAMES = {"ndcg": "ndcg_cut_10", "map": "map_cut_10", "precision": "P_10", "recall": "recall_10"}


def test_one_positive_gives_one_over_the_logarithm_of_its_rank():
    assert single_ndcg(np.array([1, 2, 3, 10, 11, 0])) == pytest.approx([1, 1 / np.log2(3), 0.5, 1 / np.log2(11), 0, 0])
    scores = np.linspace(1, 0, 40)
    ranking = rank_scores([scores] * 3, IDS)
    found = retrieval_measures(ranking, ["a", "b", "c"], {"a": {"doc0": 1}, "b": {"doc4": 2}, "c": {"doc10": 1}})
    assert found["ndcg"] == pytest.approx(single_ndcg(found["rank"]))
    assert found["rank"].tolist() == [1, 5, 11]


@pytest.mark.parametrize("ties", [False, True])
def test_measures_are_those_of_trec(ties):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    random = np.random.default_rng(int(ties))
    scores = random.integers(0, 5, (30, 40)) / 4 if ties else random.permutation(1200).reshape(30, 40) / 1200
    queries = [f"q{i}" for i in range(30)]
    judged = {
        q: {d: int(v) for d, v in zip(IDS, random.choice([0, 0, 0, 1, 2], 40), strict=True)} | {"elsewhere": 1}
        for q in queries
    }
    ranking = rank_scores(scores, IDS)
    found = retrieval_measures(ranking, queries, judged)
    run = {q: dict(zip(IDS, row.tolist(), strict=True)) for q, row in zip(queries, scores, strict=True)}
    judge = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut", "map_cut", "P", "recall", "recip_rank"})
    theirs = judge.evaluate(run)
    for ours, name in {**NAMES, "reciprocal_rank": "recip_rank"}.items():
        assert found[ours] == pytest.approx([theirs[q][name] for q in queries], abs=1e-6), ours
    assert judge.evaluate(ranking.run(queries)) == theirs


def test_equal_scores_go_to_the_larger_id_whatever_the_order_of_the_corpus():
    random = np.random.default_rng(0)
    order = random.permutation(40)
    plain, mixed = rank_scores([np.ones(40)], IDS), rank_scores([np.ones(40)], [IDS[i] for i in order])
    assert plain.names(0) == mixed.names(0) == sorted(IDS, reverse=True)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(chunk):
    random = np.random.default_rng(1)
    queries, documents = random.normal(size=(9, 6)), random.normal(size=(40, 6))
    documents[20:25] = documents[3]
    whole = cosine_top(queries, documents, IDS, top=12)
    parts = cosine_top(queries, documents, IDS, top=12, chunk=chunk)
    blocks = cosine_top(queries, ((s, documents[s : s + 11]) for s in range(0, 40, 11)), IDS, top=12, chunk=chunk)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents)]
    full = -np.sort(-(unit[0] @ unit[1].T), axis=1)[:, :12]
    np.testing.assert_allclose(whole.scores, full, atol=1e-6)
    for other in (parts, blocks):
        np.testing.assert_array_equal(other.documents, whole.documents)
        np.testing.assert_array_equal(other.scores, whole.scores)


def test_a_row_of_zeros_is_alike_to_nothing():
    found = cosine_top(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [2.0, 0.0]]), ["a", "b"])
    assert found.names(0) == ["b", "a"]
    assert found.scores.tolist() == [[1, 0], [0, 0]]


def test_fewer_documents_than_places_are_ranked_all():
    assert rank_scores([np.array([0.1, 0.2])], ["a", "b"], top=1000).names(0) == ["b", "a"]


def test_the_best_ranked_of_several_positives_counts_alone():
    ranking = rank_scores([np.linspace(1, 0, 40)] * 2, IDS)
    judged = {"a": {"doc30": 2, "doc2": 1, "gone": 1}, "b": {"gone": 1, "lost": 2}}
    assert best_ranked(ranking, ["a", "b"], judged) == {"a": {"doc2": 1}, "b": {"gone": 1}}


def test_what_cannot_be_ranked_is_refused():
    x = np.ones((3, 4))
    for call, words in (
        (lambda: cosine_top(x, np.ones((2, 5)), ["a", "b"]), "one model"),
        (lambda: cosine_top(x, np.ones((2, 4)), ["a"]), "ids"),
        (lambda: cosine_top(x, np.ones((2, 4)), ["a", "b", "c"]), "ids"),
        (lambda: cosine_top(x, x, IDS[:3], top=0), "top"),
        (lambda: cosine_top(np.ones(4), x, IDS[:3]), "one row per text"),
        (lambda: rank_scores([np.ones(2)], IDS[:3]), "one per document"),
        (lambda: retrieval_measures(rank_scores([np.ones(2)], ["a", "b"]), ["q", "r"], {}), "queries"),
        (lambda: retrieval_measures(rank_scores([np.ones(2)], ["a", "b"]), ["q"], {}, k=0), "k:"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()
    bad = x.copy()
    bad[1, 2] = np.nan
    with pytest.raises(NumericError, match="row 1"):
        cosine_top(x, bad, IDS[:3])
    with pytest.raises(NumericError, match="NaN"):
        rank_scores([np.array([0.1, np.nan])], ["a", "b"])


class Counting:
    """An encoder that counts what it is asked for, and may be stopped."""

    def __init__(self, stop: int | None = None):
        self.seen: list[str] = []
        self.stop = stop

    def __call__(self, texts, is_query):
        if self.stop is not None and len(self.seen) >= self.stop:
            raise KeyboardInterrupt
        self.seen += texts
        return np.array([[len(text), is_query, 1.0] for text in texts])


def encoder(function, version="1"):
    return CallableEncoder(function=function, name="counting", version=version)


def test_an_interrupted_corpus_goes_on_where_it_was(tmp_path):
    texts = [f"text {i}" + "x" * i for i in range(25)]
    first = Counting(stop=10)
    with pytest.raises(KeyboardInterrupt):
        encoded(encoder(first), texts, folder=tmp_path, part=5)
    again = Counting()
    told = []
    found = encoded(encoder(again), texts, folder=tmp_path, part=5, progress=lambda *step: told.append(step))
    assert again.seen == texts[10:]
    assert told[-1] == ("counting: documents", 25, 25)
    np.testing.assert_array_equal(found, encoded(encoder(Counting()), texts))


def test_parts_of_other_texts_encoders_and_sides_are_not_taken(tmp_path):
    texts = ["one", "two"]
    encoded(encoder(Counting()), texts, folder=tmp_path)
    for function, version, own, query in (
        (Counting(), "2", texts, False),
        (Counting(), "1", texts[::-1], False),
        (Counting(), "1", texts, True),
    ):
        encoded(encoder(function, version), own, folder=tmp_path, is_query=query)
        assert function.seen == own


def test_a_broken_part_is_made_again(tmp_path):
    encoded(encoder(Counting()), ["one", "two"], folder=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    function = Counting()
    assert encoded(encoder(function), ["one", "two"], folder=tmp_path).shape == (2, 3)
    assert function.seen == ["one", "two"]


def test_embeddings_that_are_no_numbers_name_their_text():
    def broken(texts, is_query):
        return np.array([[np.nan if text == "bad" else 1.0, 1.0] for text in texts])

    with pytest.raises(NumericError, match="text 3 \\('bad'"):
        list(encoded_blocks(encoder(broken), ["a", "b", "c", "bad"], part=2))
    with pytest.raises(ArgumentError, match="shape"):
        encoded(encoder(lambda texts, is_query: np.ones(3)), ["a"])
