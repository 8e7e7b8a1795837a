"""The TAPPA recipe at smoke size, its planted heads, and that its measurements can fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _tappa_real as real
from headway.evidence.recipes import tappa as recipe
from headway.evidence.recipes.tappa import CLASSES, CRITERIA, planted_head
from headway.kernels.rope import channel_energies, rope_frequencies, rotate
from headway.methods.long_context.tappa import query_similarity


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("tappa", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def context(tmp_path, seed: int = 0) -> Context:
    return Context(size="smoke", seed=seed, out=tmp_path)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_no_bound_is_violated_but_a_few_trials_prove_nothing(smoke):
    assert claim(smoke, "bounds").measured.value == 0
    assert claim(smoke, "bounds").verdict == "inconclusive"
    assert all(0 < ratio < 1 for ratio in claim(smoke, "bounds").details["mean change / bound"].values())


def test_periods_are_those_of_the_formula(smoke):
    peaks = claim(smoke, "period").details["peaks"]
    assert [round(peak["period"], 1) for peak in peaks[:3]] == [9.7, 12.0, 18.5]
    assert claim(smoke, "period").verdict == "holds"
    assert claim(smoke, "period-shift").verdict == "holds"


def test_alike_queries_give_alike_rows(smoke):
    assert claim(smoke, "predictability").measured.value >= 0.9
    assert set(claim(smoke, "predictability").details["level"]) == set(recipe.AR_LEVELS)


def test_the_confusion_table_counts_every_planted_head(smoke):
    found = claim(smoke, "classification")
    table = found.details["truth by label"][str(recipe.NOISE)]
    right = sum(table[kind][kind] for kind in CLASSES)
    assert sum(sum(row.values()) for row in table.values()) == found.measured.n == 12
    assert found.measured.value == right / 12


def test_a_few_random_heads_say_nothing_about_trained_models(smoke):
    for name in ("real-weights", "real-logits"):
        assert claim(smoke, name).verdict == "inconclusive"
        assert claim(smoke, name).measured.n == 2
        assert claim(smoke, name).others["over_heads"].n == 8


def text_of(rng, agreement, heads=120, readings=("all_pre_rope", "adjacent_pre_rope")):
    similarity = rng.normal(size=heads)
    rows = agreement * similarity + (1 - agreement) * rng.normal(size=heads)
    names = ("vertical", "overlap", "without_first", "steadiness")
    return {
        "similarity": dict.fromkeys(readings, similarity.tolist()),
        "rows": dict.fromkeys(names, rows.tolist()),
        "model": "drawn", "tokens": 9, "labels": {}, "largest_tightness": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(("agreement", "texts", "verdict"), [
    (0.7, 4, "holds"), (0.0, 4, "fails"), (0.7, 2, "inconclusive"),
])  # fmt: skip
def test_a_real_model_is_judged_over_texts_and_over_heads(tmp_path, agreement, texts, verdict):
    found = [text_of(np.random.default_rng(i), agreement) for i in range(texts)]
    for made in (real._weights_claim, real._logits_claim):
        measured = made(context(tmp_path), found)
        assert measured.verdict == verdict
        assert measured.measured.n == texts


def test_texts_that_disagree_decide_nothing(tmp_path):
    found = [text_of(np.random.default_rng(i), agreement) for i, agreement in enumerate((0.9, 0.0, 0.9, 0.0, 0.6))]
    assert real._weights_claim(context(tmp_path), found).verdict == "inconclusive"


def test_the_same_seed_measures_the_same(smoke, tmp_path):
    again = prove("tappa", size="smoke", seed=3, out=tmp_path, show_progress=False)
    assert [found.to_dict() for found in again.claims] == [found.to_dict() for found in smoke.claims]


def test_the_confusion_table_is_drawn(smoke):
    assert (smoke.folder / "plots" / "classification.html").exists()


def test_a_bound_that_is_too_small_is_caught(tmp_path, monkeypatch):
    honest = recipe.diagonal_bound
    monkeypatch.setattr(recipe, "diagonal_bound", lambda *given: 0.05 * honest(*given))
    assert recipe._bounds(context(tmp_path))["violations"] > 50


def test_a_wrong_base_is_caught(tmp_path, monkeypatch):
    honest = recipe.rotate
    wrong = rope_frequencies(recipe.PERIOD_DIM, 3e5)
    monkeypatch.setattr(recipe, "rotate", lambda x, positions, _: honest(x, positions, wrong))
    peaks = [recipe._peak(context(tmp_path), base, pair, 0) for base, pair in recipe.PERIOD_CASES]
    assert max(abs(peak["peak"] - peak["period"]) for peak in peaks) > 1


@pytest.mark.parametrize("kind", ["re-access", "sequential", "periodic", "mixed"])
def test_planted_predictable_heads_have_alike_queries(kind):
    query, _ = planted_head(kind, torch.Generator().manual_seed(0), tokens=64)
    assert float(query_similarity(query[None, None])) > 0.9


def test_planted_retrieval_queries_are_unlike_each_other():
    query, _ = planted_head("retrieval", torch.Generator().manual_seed(0), tokens=256)
    assert abs(float(query_similarity(query[None, None]))) < 0.02


def test_a_planted_periodic_head_has_one_dominant_pair():
    query, key = planted_head("periodic", torch.Generator().manual_seed(0), tokens=64)
    assert float(channel_energies(query[None, None], key[None, None]).max()) > 0.5


def test_a_planted_sequential_head_reads_a_fixed_distance():
    query, key = planted_head("sequential", torch.Generator().manual_seed(2), tokens=64, noise=0.0)
    turned = [rotate(x[None], torch.arange(64), rope_frequencies(64, 1e4))[0] for x in (query, key)]
    strongest = (turned[0] @ turned[1].T)[10:].argmax(-1)
    distance = torch.arange(10, 64) - strongest
    assert len(set(distance.tolist())) == 1
    assert 0 <= int(distance[0]) <= 4


def test_an_unknown_class_is_named():
    with pytest.raises(ArgumentError, match="kind: got 'sink'"):
        planted_head("sink", torch.Generator())


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("tappa").check_runnable("full")
    load_recipe("tappa").check_runnable("small")
