"""The recipe of local linear attention at smoke size, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import prove
from headway.evidence.recipes import _local_linear_solver as solver
from headway.evidence.recipes import _local_linear_trained as toys
from headway.evidence.recipes import local_linear_attention as recipe
from headway.evidence.recipes._peak_bytes import PeakBytes
from headway.evidence.recipes.local_linear_attention import CRITERIA


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove(
        "local-linear-attention", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False
    )


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_untrained_toys_prove_nothing(smoke):
    for name in ("recall-softmax", "recall-linear", "regression"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_the_gradient_is_whole_and_the_published_one_is_not(smoke):
    found = claim(smoke, "gradient")
    assert found.verdict == "holds"
    assert set(found.details["missed share of dq, dk by ridge"]) == {"0.1", "1", "10"}


def test_memory_is_linear_against_quadratic(smoke):
    found = claim(smoke, "memory")
    assert found.measured.value < found.baseline.value
    peaks = found.details["peak bytes"]
    assert peaks["block"][-1] < peaks["reference"][-1]


def test_the_peak_counts_what_is_alive_at_one_time():
    with PeakBytes() as peak:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(1500)
        third = second + 1
        del second, third
    assert peak.highest == 2 * 6000


def test_conditioning_covers_every_case(smoke):
    assert len(claim(smoke, "conditioning").details["error by case"]) == len(solver.CONDITIONS)


def test_the_same_estimator_on_both_sides_is_no_win(smoke, monkeypatch, tmp_path):
    found = {
        d: {name: [1.0, 2.0, 3.0, 1.5, 2.5, 2.0] for name in ("local", "softmax", "ridge", "linear")}
        for d in recipe.DIMS
    }
    context = recipe.Context(size="smoke", seed=0, out=tmp_path)
    assert recipe._piecewise_claim(context, "piecewise", found).verdict == "fails"


@pytest.mark.parametrize("task", ["recall", "regression"])
def test_queries_have_answers_among_the_pairs(task):
    batch = toys.BATCHES[task](3, 12, torch.Generator().manual_seed(0))
    assert batch["queries"].shape[:2] == batch["labels"].shape[:2] == (3, toys.QUERIES)
    if task == "recall":
        for row in range(3):
            pairs = dict(zip(batch["keys"][row].tolist(), batch["values"][row].tolist(), strict=True))
            assert len(pairs) == 12
            assert [pairs[k] for k in batch["queries"][row].tolist()] == batch["labels"][row].tolist()


def test_training_lowers_the_error():
    few, more = (toys.trained("regression", "local_linear", 1, steps=s, pairs=12, batch=8, test=32) for s in (1, 40))
    assert more < few
