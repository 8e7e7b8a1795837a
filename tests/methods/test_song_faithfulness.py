"""Whether an explanation is right, on models where the right one is known; probes and recurrent classifiers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tests.methods.song_hosts import VOCABULARY, Plain, bert, decoder, example, linear

from headway.errors import ArgumentError
from headway.methods.diagnosis.song_of_disagreement import (
    AttentiveLSTM,
    Example,
    HostClassifier,
    RecurrentClassifier,
    Settings,
    accuracy,
    average_precision,
    encode,
    entmax,
    explain,
    faithfulness,
    fit_probe,
    prepare,
)
from headway.methods.diagnosis.song_of_disagreement.classifier import Classifier, Probabilities

ALL_BUT_ENDS = slice(1, -1)


@pytest.fixture(scope="module")
def additive():
    """f is a sum over tokens, so the right order is known."""
    plain = linear()
    given = example(12)
    problem = prepare(plain, given, Settings(sign="signed"))
    return problem, explain(plain, given, ["ablation"], Settings(sign="signed"))["ablation"].signed


def test_the_right_order_removes_most_and_keeps_most(additive):
    problem, right = additive
    best, worst = (faithfulness(problem, sign * right) for sign in (1, -1))
    assert best.aopc_comprehensiveness > worst.aopc_comprehensiveness
    assert best.aopc_sufficiency < worst.aopc_sufficiency
    assert best.excess > 0 > worst.excess
    assert best.random_comprehensiveness == worst.random_comprehensiveness


def test_removal_by_hand(additive):
    problem, right = additive
    found = faithfulness(problem, right, shares=(0.2, 1.0))
    inner = np.sort(right[ALL_BUT_ENDS])[::-1]
    assert found.comprehensiveness == pytest.approx((inner[:2].sum(), inner.sum()), abs=1e-5)
    assert found.sufficiency == pytest.approx((inner[2:].sum(), 0), abs=1e-5)


def test_random_orders_are_random_orders(additive):
    problem, right = additive
    found = faithfulness(problem, right, shares=(0.5,), random_orders=400)
    assert found.random_comprehensiveness == pytest.approx(right[ALL_BUT_ENDS].sum() / 2, abs=0.15)
    assert math.isnan(faithfulness(problem, right, random_orders=0).random_sufficiency)


def test_what_cannot_be_removed_is_refused(additive):
    problem, right = additive
    for shares in ((), (0.0,), (1.2,)):
        with pytest.raises(ArgumentError, match="shares"):
            faithfulness(problem, right, shares=shares)
    with pytest.raises(ArgumentError, match="one for each"):
        faithfulness(problem, right[:3])
    bare = example(2)
    with pytest.raises(ArgumentError, match="no ordinary tokens"):
        faithfulness(prepare(linear(), bare, Settings()), np.zeros(2))


def test_average_precision_is_scikits():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    for _ in range(20):
        scores, relevant = random.integers(5, size=12), random.random(12) < 0.4
        relevant[0] = True
        assert average_precision(scores, relevant) == pytest.approx(metrics.average_precision_score(relevant, scores))
    assert math.isnan(average_precision([1, 2], [False, False]))


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_entmax_is_a_distribution_that_solves_its_own_equation(alpha):
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = entmax(logits, alpha)
    assert torch.allclose(found.sum(-1), torch.ones(4, dtype=torch.float64))
    # Where p > 0, p^(α−1) = (α−1) z − τ with one τ a row.
    for p, z in zip(found, logits, strict=True):
        thresholds = ((alpha - 1) * z - p ** (alpha - 1))[p > 0]
        assert torch.allclose(thresholds, thresholds[0].expand_as(thresholds), atol=1e-8)
        assert ((alpha - 1) * z[p == 0] <= thresholds[0] + 1e-9).all()


def test_sparsemax_by_hand():
    assert entmax(torch.tensor([2.0, 1.5, 0.0]), 2.0).tolist() == pytest.approx([0.75, 0.25, 0.0])
    assert entmax(torch.tensor([1.0, -torch.inf, 1.0]), 2.0).tolist() == pytest.approx([0.5, 0, 0.5])
    with pytest.raises(ArgumentError, match="alpha"):
        entmax(torch.zeros(3), 1.0)


def test_entmax_has_the_right_gradients():
    logits = torch.tensor([[0.3, -0.2, 1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entmax, (logits, alpha))


@pytest.mark.parametrize("activation", ["softmax", "uniform", "sparsemax", "entmax", "learned"])
@pytest.mark.parametrize("split", [None, 5])
def test_a_recurrent_network_weighs_every_text_to_one_and_no_padding(activation, split):
    torch.manual_seed(0)
    network = AttentiveLSTM(VOCABULARY, width=6, hidden=5, activation=activation, split=split).eval()
    ids = torch.randint(1, VOCABULARY, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 7:] = False
    logits, weights = network(network.embedding(ids), mask)
    assert torch.allclose(weights.sum(-1), torch.full((2,), 1.0 if split is None else 2.0))
    assert (weights[1, 7:] == 0).all()
    alone, _ = network(network.embedding(ids[1:, :7]), mask[1:, :7])
    assert torch.allclose(alone[0], logits[1], atol=1e-6)
    with pytest.raises(ArgumentError, match="activation"):
        AttentiveLSTM(VOCABULARY, activation="relu")


def test_ties_of_sparse_attention_are_no_order():
    from headway.methods.diagnosis.song_of_disagreement import pair_agreement

    sparse = [np.array([0.0, 0.0, 1.0, 0.0]), np.zeros(4)]
    found = pair_agreement(("sparse", "other"), sparse, [np.arange(4.0)] * 2)
    assert (found.n, found.undefined) == (1, 1)
    assert found.values[0] == pytest.approx(stats.kendalltau(sparse[0], np.arange(4)).statistic)


def test_one_logit_is_two_sides():
    link = Probabilities()
    one = link(torch.tensor([[1.5]]))
    assert one[0].tolist() == pytest.approx([1 - 1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-1.5))])
    two = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(link(two), two.softmax(-1))
    three = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(link(three), three.softmax(-1))
    with pytest.raises(ArgumentError, match="batch, classes"):
        link(torch.zeros(3))


class OneLogit(Plain):
    def __init__(self):
        super().__init__(torch.nn.Linear(6, 1))
        self.link = Probabilities()

    def outputs(self, embeddings, mask):
        return self.link(super().outputs(embeddings, mask))


def test_the_predicted_side_of_one_logit_is_explained():
    model = OneLogit()
    for seed in range(5):
        problem = prepare(model, example(seed=seed), Settings())
        assert problem.value >= 0.5


def test_probe_separates_what_can_be_separated():
    host = bert().bert
    texts = [example(8, seed=seed, label=seed % 2) for seed in range(20)]
    for text in texts:
        text.ids[3] = 10 + text.label
    probe = fit_probe(host, texts, penalty=1e-6)
    assert accuracy(probe, texts) == 1.0
    again = fit_probe(host, texts, penalty=1e-6)
    assert torch.equal(probe.head.weight, again.head.weight)
    assert not any(p.requires_grad for p in probe.head.parameters())
    assert probe.predict(texts).sum(1) == pytest.approx(np.ones(20))


def test_probe_is_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    host = bert().bert
    texts = [example(8, seed=seed, label=seed % 2) for seed in range(24)]
    probe = fit_probe(host, texts, penalty=1e-2)
    bare = HostClassifier(host, head=torch.nn.Identity(), readout="mean", normalise=True)
    vectors = np.concatenate([
        bare.pooled(bare.embed(t.ids[None]), torch.ones(1, 8, dtype=torch.bool)).detach() for t in texts
    ])  # fmt: skip
    # Two rows ±w/2 with penalty λ Σ W² are one row w with penalty λ/2 w²: C = 1 / (λ n).
    reference = linear_model.LogisticRegression(C=1 / (1e-2 * 24), tol=1e-10, max_iter=5000)
    reference.fit(vectors, [t.label for t in texts])
    np.testing.assert_allclose(
        probe.predict(texts)[:, 1], reference.predict_proba(vectors)[:, 1], atol=5e-4
    )  # fmt: skip


def test_a_probe_needs_labels():
    host = bert().bert
    with pytest.raises(ArgumentError, match="1 of them without a label"):
        fit_probe(host, [example(label=0), example()])
    with pytest.raises(ArgumentError, match="every class"):
        fit_probe(host, [example(label=0), example(label=0)])
    with pytest.raises(ArgumentError, match="every class"):
        fit_probe(host, [example(label=0), example(label=2)])


def test_hosts_that_give_no_classes_are_refused():
    with pytest.raises(ArgumentError, match="gives no logits"):
        prepare(HostClassifier(bert().bert), example(), Settings())
    with pytest.raises(ArgumentError, match="readout"):
        HostClassifier(bert(), readout="middle")
    with pytest.raises(ArgumentError, match="no layers to read"):
        Classifier().hidden(torch.zeros(1, 1, 1), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("field", "value"), [("tokens", ("a",)), ("special", np.zeros(2, bool)), ("rationale", np.zeros(2, bool))]
)
def test_an_example_has_an_entry_for_each_token(field, value):
    fields = {name: getattr(example(5), name) for name in ("ids", "tokens", "special", "words")}
    with pytest.raises(ArgumentError, match=f"{field}: got {len(value)}"):
        Example(**{**fields, field: value})
    with pytest.raises(ArgumentError, match="flat list"):
        Example(**{**fields, "ids": torch.zeros(0, dtype=torch.long)})


class SlowTokenizer:
    is_fast = False

    def __call__(self, text, **options):
        return {"input_ids": [1, 7, 8, 2], "special_tokens_mask": [1, 0, 0, 1]}

    def convert_ids_to_tokens(self, ids):
        return [str(i) for i in ids]


def test_a_tokenizer_without_characters_cannot_mark_a_rationale():
    assert encode(SlowTokenizer(), "a b", tokens=8).words.tolist() == [-1, 1, 2, -1]
    with pytest.raises(ArgumentError, match="fast one"):
        encode(SlowTokenizer(), "a b", tokens=8, rationale=[(0, 1)])


def test_a_decoder_classifier_needs_no_pad_token():
    from headway.methods.diagnosis.song_of_disagreement import NextToken

    assert NextToken(decoder()).pad_id == 1
    assert isinstance(RecurrentClassifier(AttentiveLSTM(VOCABULARY)), Classifier)
