"""The recipe of Sigma at smoke size: every claim is there, exact ones hold, and what proves nothing says so."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _sigma_training as training
from headway.evidence.recipes.sigma_diffqkv import CRITERIA, _interleaved


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("sigma-diffqkv", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_the_cache_is_smaller_to_the_byte(smoke):
    found = claim(smoke, "cache-ratio")
    assert found.verdict == "holds"
    assert found.details["sigma"] == 8 * 20 * 64 * 4
    assert found.details["sigma shapes"] == {"key": [1, 4, 8, 64], "value": [1, 16, 8, 64]}


def test_gold_answers_get_full_marks(smoke):
    found = claim(smoke, "scorer")
    assert found.verdict == "holds"
    assert sum(len(task) for task in found.details.values()) == 23


def test_untrained_models_prove_nothing(smoke):
    for name in ("key-or-value", "augmented-query"):
        assert claim(smoke, name).verdict == "inconclusive"
        assert claim(smoke, name).others["baseline_over_bigram"].value > 1


def test_a_random_host_with_two_layers_is_too_few(smoke):
    assert claim(smoke, "pooled-heads").verdict == "inconclusive"


def test_times_are_of_both_sides_in_one_run(smoke):
    rows = claim(smoke, "decode-time").details["rows"]
    assert [row["tokens"] for row in rows] == [64, 256]
    assert {len(row[side]) for row in rows for side in row if side != "tokens"} == {3}
    assert claim(smoke, "break-even").details["break-even in numbers read"] == 22_528


def test_fewer_selected_values_never_help_much(smoke):
    found = claim(smoke, "selected-values")
    mass = found.details["mass"]
    assert 0 < mass["8"]["mean"] < mass["32"]["mean"] < mass["100"]["mean"] <= 1
    assert set(found.others) == {"top 8", "top 32", "top 100 as they were"}


def test_arms_take_the_same_cache_and_the_same_parameters_where_they_must():
    models = {name: training._model(name, 0) for name in training.ARMS}
    stored = {name: m.layers[0].mixer.layout.cache_elements for name, m in models.items()}
    assert stored["fewer keys"] == stored["fewer values"] < stored["smaller keys"] < stored["baseline"]
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    assert counts["augmented query"] == counts["wider MLP"] > counts["baseline"]
    assert counts["fewer keys"] == counts["fewer values"]


def test_the_same_seed_builds_the_same_model():
    first, again, other = (training._model("baseline", seed).embed_tokens.weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sides_take_turns():
    order = []
    _interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "baabbaab"


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("sigma-diffqkv").check_runnable("full")
