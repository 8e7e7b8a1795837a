"""The PosIR recipe at smoke size, and its toy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway.evidence import prove
from headway.evidence.recipes import _posir_claims as claims
from headway.evidence.recipes import _posir_toy as toy
from headway.evidence.recipes import posir as recipe
from headway.methods.diagnosis.posir import evaluate, from_corpus


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("posir", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_what_is_exact_holds_at_any_size(smoke):
    assert claim(smoke, "saliency-is-bounded").verdict == "holds"
    assert claim(smoke, "even-words-are-flat").others["moved"].value < 1e-9
    assert claim(smoke, "minilm-moved-answers").others["bm25"].value < 1e-9
    assert claim(smoke, "cut-is-recovered").others["behind"].value < 0.1


def words_measured(chance):
    """Planted encoders whose raw index grows with the decay; `chance` is what the null gives at each decay."""

    def one(decay):
        value = 0.2 + 0.1 * abs(decay)
        beside = {"value": value, "null_mean": chance[abs(decay)], "p_value": 0.001}
        slope = {"value": -float(np.sign(decay)), "p_value": 0.001 if decay else 0.8}
        return {"psi": beside, "linear": beside, "wide": beside, "slope": slope, "mean": 0.6, "ndcg": 0.6}

    decays = {f"decay {sign * decay:g}": sign * decay for sign in (1, -1) for decay in recipe.DECAYS}
    encoders = {"even": 0.0, "cut": 0.0, "bm25": 0.0, **decays}
    empty = {"buckets": [None] * 4, "behind": [], "reading": []}
    return {"encoders": {name: {"overall": one(decay), **empty} for name, decay in encoders.items()}, "moved": 0.0}


@pytest.mark.parametrize(
    ("chance", "verdict"),
    [({0: 0.1, 1.5: 0.1, 3.0: 0.1, 6.0: 0.1}, "holds"), ({0: 0.1, 1.5: 0.1, 3.0: 0.2, 6.0: 0.7}, "fails")],
)
def test_planted_directions_are_judged_by_the_index_beyond_chance(chance, verdict):
    made = claims.words_claims(words_measured(chance))
    found = next(one for one in made if one.id == "directions-are-recovered")
    assert found.measured.value == 1
    assert found.others["order_with_chance"].value == 1
    assert (found.others["order"].value == 1) is (verdict == "holds")
    assert found.verdict == verdict


def test_an_untrained_toy_says_nothing(smoke):
    for name in ("trained-bias-is-found", "trained-alike-on-short", "saliency-shows-the-trained-bias"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_a_fact_stands_in_one_document_only():
    made = toy.corpus(300, np.random.default_rng(0), asked=1, others=2)
    assert len({q.text for q in made.questions}) == 300
    for question in made.questions:
        statement = made.documents[question.document][question.start : question.stop]
        name, attribute = statement.split()
        assert question.text == f"q{attribute[1:]} {name}"
        assert sum(f" {statement} " in f" {text} " for text in made.documents.values()) == 1


def test_early_answers_stand_early_and_others_anywhere():
    made = toy.corpus(200, np.random.default_rng(1), where=toy.EARLY)
    places = [(q.start + q.stop) / 2 / len(made.documents[q.document]) for q in made.questions]
    assert np.median(places) < 0.2
    lengths = [len(text.split()) for text in made.documents.values()]
    assert max(lengths) <= toy.SIZES[1]
    assert max(lengths) + 2 <= toy.POSITIONS


def test_an_encoder_learns_and_does_not_touch_global_randomness():
    state = torch.random.get_rng_state()
    encoder = toy.train(30, 0, where=toy.ANYWHERE, name="short")
    assert torch.equal(state, torch.random.get_rng_state())
    data = from_corpus(toy.corpus(60, np.random.default_rng(2)))
    assert evaluate(data, encoder).scores.mean() > evaluate(data, toy.bi_encoder(0)).scores.mean()
