"""The InLine recipe at smoke size, the sets it trains on, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import Context, prove
from headway.evidence.recipes import _inline_toys as toys
from headway.evidence.recipes import inline_attention as recipe
from headway.evidence.recipes.inline_attention import CRITERIA


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("inline-attention", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def context(tmp_path) -> Context:
    return Context(size="smoke", seed=0, out=tmp_path)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_collisions_are_exact_whatever_the_size(smoke):
    found = claim(smoke, "collision")
    assert found.others["linear"].value < 1e-9
    assert found.measured.value > 0.05


def test_no_trial_breaks_the_rank_condition_and_both_sides_occur(smoke):
    found = claim(smoke, "injective")
    assert found.measured.value == 0
    assert 0 < found.details["injective"] < found.measured.n
    assert found.verdict == "inconclusive"


def test_classifiers_that_have_learned_nothing_prove_nothing(smoke):
    for name in ("mnist", "local-residual", "digits-softmax"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_every_arm_is_looked_at_after_the_fixed_budget(smoke):
    runs = claim(smoke, "digits-budget").details["runs"]
    assert set(runs) == set(toys.ARMS)
    assert all(set(run["looks"]) >= {"3"} for arm in runs.values() for run in arm)
    assert all(set(run["looks"]) == {"3", "6"} for run in runs["softmax"])


def test_cost_is_measured_on_both_sides(smoke):
    found = claim(smoke, "cost")
    assert found.others["operations_inline"].value == pytest.approx(1.0, abs=0.01)
    assert set(found.details["median seconds"]) == {"inline", "softmax"}


def test_the_plot_is_drawn(smoke):
    assert (smoke.folder / "plots" / "digits.html").exists()


def test_a_rule_that_divides_would_break_the_rank_condition(tmp_path, monkeypatch):
    honest = recipe.feature_weights
    monkeypatch.setattr(recipe, "feature_weights", lambda q, k, **_: honest(q, k) * (1 + q.sum()))
    assert recipe._ranks(context(tmp_path))["violations"] > 0


def test_a_subtraction_that_divides_would_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "INLINE", recipe.Rule(normaliser="divisive", feature="relu"))
    assert max(recipe._collisions(context(tmp_path))["inline"]) < 1e-5


def test_pattern_images_are_equally_bright_and_hold_their_pattern():
    images = toys.edges(60, torch.Generator().manual_seed(0))
    bright = (images.pixels > 1).float()
    assert bright.sum((1, 2, 3)).unique().tolist() == [6.0]
    assert images.pixels.unique().numel() == 2
    assert sorted(images.labels.unique().tolist()) == [0, 1, 2, 3]
    kernels = torch.zeros(4, 1, 3, 3)
    for kernel, shape in zip(kernels, toys.PATTERNS.values(), strict=True):
        for down, right in shape:
            kernel[0, down, right] = 1
    best = torch.nn.functional.conv2d(bright, kernels).amax((2, 3))
    assert bool((best.gather(1, images.labels[:, None]) == 3).all())


def test_brightness_tells_nothing_of_the_class():
    images = toys.edges(2000, torch.Generator().manual_seed(0))
    means = torch.stack([images.pixels[images.labels == label].mean(0) for label in range(4)])
    assert float((means - means.mean(0)).abs().mean()) < 0.07


def test_arms_with_one_seed_share_their_patches_and_places():
    images = toys.edges(20, torch.Generator().manual_seed(0))
    first, second = (
        toys.classifier(name, images, seed=5, patch=1, width=16, layers=1) for name in ("linear", "inline + local")
    )
    assert torch.equal(first.patches.weight, second.patches.weight)
    assert torch.equal(first.places, second.places)


def test_three_neighbours_vote_and_the_nearest_decides_a_tie():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.0]])
    known = torch.tensor([0, 1, 1, 2])
    assert recipe._right(query, gallery, known, torch.tensor([1])) == [1]
    assert recipe._right(query, gallery, torch.tensor([0, 1, 2, 2]), torch.tensor([0])) == [1]
