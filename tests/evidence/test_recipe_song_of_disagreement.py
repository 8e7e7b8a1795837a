"""The recipe of A Song of (Dis)agreement at smoke size, and its toys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _agreement_claims as claims
from headway.evidence.recipes import _agreement_habits as habits
from headway.evidence.recipes import _agreement_measures as measures
from headway.evidence.recipes import _agreement_toys as toys
from headway.evidence.recipes import song_of_disagreement as recipe


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return prove("song-of-disagreement", size="smoke", seed=1, out=out, show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_untrained_toys_say_nothing(smoke):
    for found in smoke.claims:
        if found.criterion.requires:
            assert found.verdict == "inconclusive", found.id


def test_what_is_exact_holds_at_any_size(smoke):
    assert claim(smoke, "completeness-tells").measured.value < 1e-3


def test_toys_learn_in_any_order_of_their_texts():
    for rule in ("additive", "pair"):
        first, again = (toys.examples(rule, 6, 3) for _ in range(2))
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
        assert all(e.rationale is not None and e.rationale.any() for e in first)


def test_training_gives_the_same_toy_from_the_same_seed():
    one, other = toys.recurrent(0), toys.recurrent(0)
    assert toys.train(one, "additive", 2, 0) == toys.train(other, "additive", 2, 0)
    assert torch.equal(one.network.decoder.weight, other.network.decoder.weight)
    assert not one.module.training


def test_a_method_that_follows_places_or_rarity_is_told():
    class Context:
        def generator(self, name):
            return np.random.default_rng(0)

    made = {
        "family": "recurrent",
        "rule": "additive",
        "accuracy": 1.0,
        "auroc": {"lime": [1.0], "integrated_gradients": [1.0], "attention_last": [1.0]},
        "place": {"lime": [-0.5, float("nan"), -0.3, -0.4] * 5, "attention_last": [0.9]},
        "rarity": {"lime": [-0.02, 0.04] * 20, "attention_last": [0.9]},
    }
    found = habits.habit_claims(Context(), [made, made | {"rule": "negation"}], made)
    assert [c.id for c in found] == list(habits.CRITERIA)
    place, rarity, _ = found
    assert (place.measured.value, place.verdict) == (pytest.approx(0.4), "fails")
    assert (rarity.measured.value, rarity.verdict) == (pytest.approx(0.01), "holds")


def test_places_are_compared_among_tokens_that_decide_nothing():
    (example,) = toys.examples("additive", 1, 0)
    marks = example.rationale[~example.special]
    assert measures._idle(example).tolist() == (~marks).tolist()


def test_precision_is_that_of_the_planted_words_alone(monkeypatch):
    """A method that ranks the deciding words first, and one that ranks them last."""
    given = toys.examples("additive", 3, 0)

    class One:
        error = None

        def __init__(self, scores):
            self.scores = scores

    def explain(classifier, example, methods, settings, seed):
        marks = example.rationale.astype(float)
        noise = np.linspace(0, 0.1, len(marks))
        return {"lime": One(marks + noise), "ablation": One(1.1 - marks + noise)} if methods else {}

    monkeypatch.setattr(measures, "explain", explain)
    found = measures.compared(toys.recurrent(0), given, ("lime", "ablation"), measures.Settings(masks=4), 0)
    assert found["precision"]["lime"] == found["auroc"]["lime"] == [1.0] * 3
    assert found["auroc"]["ablation"] == [0.0] * 3
    assert all(0 < value < 0.6 for value in found["precision"]["ablation"])


def test_methods_are_chosen_on_other_texts_than_they_are_measured_on():
    class Context:
        def generator(self, name):
            return np.random.default_rng(0)

    # "lucky" is right on the texts that choose it alone, "dull" on none.
    found = {
        "auroc": {"good": [1.0] * 8, "lucky": [1.0, 0.0] * 4, "dull": [0.5] * 8},
        "precision": {"good": [1.0, 0.8] * 4, "lucky": [1.0, 0.2] * 4, "dull": [0.1] * 8},
        "pairs": {"good lucky": [0.9, 0.1] * 4, "good dull": [0.7] * 8, "lucky dull": [0.7] * 8},
    }
    made = claims.faithful_claim(
        Context(), "real-faithful-without-agreement", [found], {"accuracy": claims.Measurement(1.0)}, "x.", ""
    )
    assert made.details["methods"] == [["good", "lucky"]]
    assert made.measured.value == pytest.approx(0.1)
    assert made.others["auroc"].value == pytest.approx(0.5)
    assert made.others["average_precision"].value == pytest.approx(0.5), "of good and lucky on the texts left"
    assert made.details["precision"] == [{"good": pytest.approx(0.9), "lucky": pytest.approx(0.6), "dull": 0.1}]
    assert made.verdict == "fails"


def test_the_full_size_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("song-of-disagreement").check_runnable("full")
