"""Encoders behind one protocol, whole evaluations, and planted position biases that they recover."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.evidence.recipes import _posir_toy as toy
from headway.methods.diagnosis.posir import (
    Bm25,
    CallableEncoder,
    Encoder,
    PooledEncoder,
    Query,
    RetrievalSet,
    Scorer,
    SentenceTransformersEncoder,
    TransformersEncoder,
    WordEncoder,
    count_tokens,
    evaluate,
    from_corpus,
    load_sentence_transformer,
    paired_intervention,
    pool_domains,
    saliency,
    word_tokens,
)
from headway.methods.diagnosis.posir.encoders import pool
from headway.methods.diagnosis.posir.paired import within_slopes
from headway.tasks.positioned_evidence import Fact, topic_corpus

EDGES = (100, 200, 300)
TEXTS = ["w1 w2", "w3", "n1 a2 w5 w6 w7 w8 w9 w1 w2", "w4 w4 w4 w4"]


@pytest.fixture(scope="module")
def planted():
    """Documents of 40 to 400 words whose question shares one rare word with its answer."""
    made = topic_corpus(500, np.random.default_rng(0), sizes=(40, 400), topics=5)
    return count_tokens(from_corpus(made), word_tokens, name="words")


def sensitivities(data, encoder):
    found = evaluate(data, encoder)
    return found, found.overall(edges=EDGES, resamples=300), found.buckets(edges=EDGES, resamples=300)


def test_a_bag_of_words_has_no_position(planted):
    found, overall, buckets = sensitivities(planted, WordEncoder())
    assert 0.3 < overall.mean < 0.99
    assert overall.psi.p_value > 0.05
    assert all(b.psi.p_value > 0.0125 for b in buckets.values())
    assert overall.direction == "none"
    assert set(found.reading(edges=EDGES).values()) == {("read whole", 0.0)}


@pytest.mark.parametrize(("decay", "direction"), [(6.0, "primacy"), (-6.0, "recency")])
def test_planted_primacy_and_recency_are_recovered(planted, decay, direction):
    _, overall, buckets = sensitivities(planted, WordEncoder(decay=decay))
    assert overall.direction == direction
    assert overall.psi.p_value < 0.01
    assert overall.psi.excess > 0.2
    assert np.sign(overall.trend["spearman"]) == -np.sign(decay)
    assert buckets["Q4 (300, ∞)"].direction == direction


def test_planted_truncation_is_recovered_and_named(planted):
    found, overall, buckets = sensitivities(planted, WordEncoder(max_tokens=100))
    last = buckets["Q4 (300, ∞)"]
    assert last.psi.value == 1
    assert np.nanargmin(last.means) > 5
    assert np.nanmax(last.means[10:]) < 0.2
    ndcg = [b.ndcg for b in buckets.values()]
    assert ndcg == sorted(ndcg, reverse=True)
    reading = found.reading(edges=EDGES)
    assert [kind for kind, _ in reading.values()] == ["read whole", *["truncation test"] * 3]
    assert reading["Q4 (300, ∞)"][1] > 0.6
    assert found.scores[found.stops > 108].mean() < 0.06
    assert overall.direction == "primacy"


def test_what_stands_behind_the_cut_does_not_matter():
    encoder = WordEncoder(max_tokens=5)
    a, b = encoder.encode(["one two three four five six", "one two three four five SEVEN eight"], is_query=False)
    np.testing.assert_array_equal(a, b)
    real = toy.bi_encoder(0)
    real = TransformersEncoder(model=real.model, tokenizer=real.tokenizer, max_tokens=6)
    a, b = real.encode(["w1 w2 w3 w4 w5 w6", "w1 w2 w3 w4 n9 n8 n7 n6"], is_query=False)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_bm25_has_no_position_and_finds_rare_words(planted):
    _, overall, _ = sensitivities(planted, Bm25())
    assert overall.mean > 0.95
    assert overall.psi.value < 0.2
    assert overall.direction == "none"
    scorer = Bm25()
    scorer.prepare(["a b", "", "c"])
    assert scorer.scores("c").argmax() == 2
    assert scorer.scores("") == pytest.approx(np.zeros(3))
    assert scorer.scores("never seen") == pytest.approx(np.zeros(3))


def test_every_retriever_follows_a_protocol():
    real = toy.bi_encoder(0)
    assert isinstance(real, Encoder)
    assert isinstance(WordEncoder(), Encoder)
    assert isinstance(CallableEncoder(function=lambda t, q: np.ones((len(t), 2)), name="ones"), Encoder)
    assert isinstance(Bm25(), Scorer)
    with pytest.raises(ArgumentError, match="expected an encoder"):
        evaluate(from_corpus(toy.corpus(3, np.random.default_rng(0))), object())


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_finds_the_real_tokens_on_either_side(pooling, side):
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    if side == "left":
        real = real.flip(1)
    found = pool(states, real, pooling)
    for row in (0, 1):
        own = states[row][real[row]]
        expected = {"mean": own.mean(0), "cls": own[0], "last": own[-1]}[pooling]
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_batch_gives_what_single_texts_give(pooling):
    encoder = toy.bi_encoder(1, pooling=pooling)
    single = np.concatenate([encoder.encode([text], is_query=False) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS, is_query=False), single, atol=1e-5)


def test_a_tokenizer_that_pads_on_the_left_changes_nothing():
    encoder = toy.bi_encoder(1)
    plain = encoder.encode(TEXTS, is_query=False)
    encoder.tokenizer.padding_side = "left"
    try:
        np.testing.assert_allclose(encoder.encode(TEXTS, is_query=False), plain, atol=1e-6)
    finally:
        encoder.tokenizer.padding_side = "right"


def test_identity_tells_weights_pooling_and_prefix_apart():
    one = toy.bi_encoder(0)
    same, other = toy.bi_encoder(0), toy.bi_encoder(1)
    pooled = TransformersEncoder(model=one.model, tokenizer=one.tokenizer, pooling="cls", name="toy")
    prefixed = TransformersEncoder(model=one.model, tokenizer=one.tokenizer, query_prefix="q0 ", name="toy")
    assert one.identity == same.identity
    assert len({e.identity for e in (one, other, pooled, prefixed)}) == 4


def test_prefixes_go_before_their_own_side():
    plain = toy.bi_encoder(0)
    encoder = TransformersEncoder(
        model=plain.model, tokenizer=plain.tokenizer, query_prefix="q0 ", document_prefix="a1 "
    )
    np.testing.assert_allclose(encoder.encode(["w1"], is_query=True), plain.encode(["q0 w1"], is_query=True), atol=1e-6)
    np.testing.assert_allclose(
        encoder.encode(["w1"], is_query=False), plain.encode(["a1 w1"], is_query=False), atol=1e-6
    )


def test_settings_that_cannot_be_used_are_refused():
    own = toy.bi_encoder(0)
    for options, words in (
        ({"pooling": "max"}, "pooling"),
        ({"max_tokens": toy.POSITIONS + 1}, "positions of the model"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"batch": 0}, "batch"),
    ):
        with pytest.raises(ArgumentError, match=words):
            TransformersEncoder(model=own.model, tokenizer=own.tokenizer, **options)
    with pytest.raises(ArgumentError, match="SentenceTransformer"):
        SentenceTransformersEncoder(model=object())
    for options, words in (({"max_tokens": 0}, "max_tokens: got 0"), ({"batch": 0}, "batch: got 0")):
        model = types.SimpleNamespace(encode=print, max_seq_length=256)
        with pytest.raises(ArgumentError, match=words):
            SentenceTransformersEncoder(model=model, **options)
        assert model.max_seq_length == 256
    with pytest.raises(ArgumentError, match="width"):
        WordEncoder(width=2)


def small(name="made", judgements=None):
    documents = {"a": "red fox " * 3, "b": "blue boat " * 3, "c": "green tree " * 3}
    queries = tuple(
        Query(id=f"q{i}", text=text, span=(0, 3), characters=18, tokens=6) for i, text in enumerate(("red", "blue"))
    )
    return RetrievalSet(
        name=name, queries=queries, documents=documents, judgements=judgements or {"q0": {"a": 1}, "q1": {"b": 1}}
    )


def test_positives_that_are_absent_or_not_found_score_nothing_and_are_counted():
    data = small(judgements={"q0": {"gone": 1}, "q1": {"c": 1}})
    found = evaluate(data, WordEncoder(), top=1)
    assert found.scores.tolist() == [0, 0]
    assert (found.absent, found.not_found) == (1, 1)
    nothing = small(judgements={"q0": {"a": 0}})
    with pytest.raises(ArgumentError, match="no query has a judged positive"):
        evaluate(nothing, WordEncoder())


def test_the_best_of_several_positives_is_scored_as_if_alone():
    data = small(judgements={"q0": {"c": 1, "a": 1}, "q1": {"b": 1}})
    with pytest.raises(ArgumentError, match="several"):
        evaluate(data, WordEncoder())
    assert evaluate(data, WordEncoder(), several="best").scores.tolist() == [1, 1]
    assert evaluate(data, WordEncoder(), several="first").scores[0] < 1


def test_domains_are_pooled_by_query():
    one, other = evaluate(small("one"), WordEncoder()), evaluate(small("two"), WordEncoder())
    both = pool_domains([one, other])
    assert both.queries == ["one/q0", "one/q1", "two/q0", "two/q1"]
    assert len(both.scores) == len(both.positions) == 4
    with pytest.raises(ArgumentError, match="one retriever"):
        pool_domains([one, evaluate(small(), Bm25())])


def test_an_evaluation_keeps_its_embeddings(tmp_path, planted):
    told = []
    encoder = WordEncoder()
    first = evaluate(planted, encoder, folder=tmp_path)
    encoder.encode = lambda texts, is_query: pytest.fail("encoded again")
    again = evaluate(planted, encoder, folder=tmp_path, progress=lambda *step: told.append(step))
    np.testing.assert_array_equal(first.scores, again.scores)
    assert told[-1][1:] == (500, 500)


FILLED = [[f"filler{i} number{j}" for j in range(20)] for i in range(6)]
FACTS = [Fact(statement=f"thing{i} is hidden here", question=f"thing{i}") for i in range(6)]


class TestPaired:
    def test_slopes_are_least_squares_within_a_document(self):
        random = np.random.default_rng(0)
        x, y = random.random((4, 10)), random.random((4, 10))
        expected = [np.polyfit(a, b, 1)[0] for a, b in zip(x, y, strict=True)]
        np.testing.assert_allclose(within_slopes(x, y), expected)

    @pytest.mark.parametrize(("decay", "sign"), [(3.0, -1), (-3.0, 1)])
    def test_moved_evidence_shows_the_planted_direction(self, decay, sign):
        found = paired_intervention(WordEncoder(decay=decay), FILLED, FACTS)
        assert sign * found.slope.value > 0
        assert min(sign * found.slope.low, sign * found.slope.high) > 0
        assert found.scores.shape == found.positions.shape == (6, 10)
        assert np.sign(found.share) == sign

    def test_without_a_bias_nothing_changes(self):
        for retriever in (WordEncoder(), Bm25()):
            found = paired_intervention(retriever, FILLED, FACTS)
            assert found.slope.value == pytest.approx(0, abs=1e-6)
            assert found.scores.mean() > found.without + 0.03

    def test_an_interrupted_intervention_goes_on(self, tmp_path):
        plain = paired_intervention(WordEncoder(decay=2), FILLED, FACTS, folder=tmp_path)
        encoder = WordEncoder(decay=2)
        encoder.encode = lambda texts, is_query: pytest.fail("encoded again")
        again = paired_intervention(encoder, FILLED, FACTS, folder=tmp_path)
        np.testing.assert_array_equal(again.scores, plain.scores)

    def test_each_filler_needs_a_fact(self):
        with pytest.raises(ArgumentError, match="one fact for each"):
            paired_intervention(WordEncoder(), FILLED, FACTS[:2])


@pytest.mark.real
def test_minilm_is_the_same_through_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers")
    import headway

    model, tokenizer = headway.load("minilm")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = load_sentence_transformer(str(tmp_path), max_tokens=64)
    ours = TransformersEncoder(model=model, tokenizer=tokenizer, max_tokens=64)
    texts = ["A fox ran.", "Three boats lay still in the harbour. " * 20]
    assert theirs.model.max_seq_length == theirs.max_tokens == 64
    np.testing.assert_allclose(theirs.encode(texts, is_query=False), ours.encode(texts, is_query=False), atol=1e-4)
    assert isinstance(theirs, PooledEncoder)
    pairs = [("Where are boats?", text) for text in texts]
    np.testing.assert_allclose(saliency(theirs, pairs).curves, saliency(ours, pairs).curves, atol=1e-3)
    assert theirs.identity == theirs.identity != ours.identity
