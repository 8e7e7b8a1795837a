"""The FlexPrefill recipe at smoke size, its planted heads and baselines, and that its measurements can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.door import AttentionCall, Blocks
from headway.door.execute import selection_density
from headway.errors import ArgumentError
from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _flexprefill_text as text
from headway.evidence.recipes import flexprefill as recipe
from headway.evidence.recipes._flexprefill_baselines import (
    BASELINES,
    Prefill,
    fixed_blocks,
    random_blocks,
    window_of_density,
)
from headway.evidence.recipes._flexprefill_planted import planted, planted_head
from headway.evidence.recipes._flexprefill_text import GAMMAS, Baselines, compared, exact_needles, sides_of
from headway.evidence.recipes.flexprefill import CRITERIA
from headway.methods.long_context.flexprefill import FlexPrefill


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("flexprefill", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def make_call(tokens=96, heads=4, seed=0) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(1, heads, tokens, 16, generator=generator)
    key, value = (torch.randn(1, 2, tokens, 16, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, causal=True)


METHOD = FlexPrefill(block=8, min_budget=16, approximates=False)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_few_heads_and_one_text_say_nothing(smoke):
    for found in smoke.claims:
        assert found.verdict == "inconclusive"


def test_planted_heads_show_their_differences(smoke):
    assert claim(smoke, "spread").measured.value > 5
    assert claim(smoke, "late-rows").measured.value < 0.5
    assert claim(smoke, "gamma").measured.value == 0
    assert claim(smoke, "pattern").measured.value > 0.8


@pytest.mark.parametrize("what", ["call", "mean"])
def test_baselines_are_measured_at_the_density_of_the_method(smoke, what):
    claim_id = {"call": "mass-by-gamma", "mean": "mass-one-budget"}[what]
    curves = claim(smoke, claim_id).details["curves"]
    assert set(curves) == {"flex", *BASELINES}
    for name in BASELINES:
        for gamma, point in curves["flex"].items():
            assert curves[name][gamma]["density"] == pytest.approx(point["density"], rel=0.05)


def test_the_density_and_what_is_kept_grow_with_gamma(smoke):
    points = list(claim(smoke, "mass-by-gamma").details["curves"]["flex"].values())
    assert len(points) == len(GAMMAS) >= 3
    for what in ("density", "mass"):
        values = [point[what] for point in points]
        assert values == sorted(values)
        assert values[-1] > values[0] + 0.02


def test_densities_and_curves_are_drawn(smoke):
    for name in ("density-by-gamma", "mass-by-gamma", "mass-one-budget"):
        assert (smoke.folder / "plots" / f"{name}.html").exists()


def test_one_budget_is_the_mean_over_calls_and_the_other_that_of_each_call():
    """A sharp and a flat call: the first is given more than it read, the second less."""
    sharp, flat = make_call(256, seed=1), make_call(256, seed=2)
    sharp = sharp.replace(query=6 * sharp.query)
    flat = flat.replace(query=0.1 * flat.query, site=replace(flat.site, layer=1))
    found = compared([sharp, flat], METHOD, [128, 256], 0)
    own = [call["flex"][1]["density"] for call in found]
    assert own[0] < own[1] - 0.1
    for call, density in zip(found, own, strict=True):
        for name in BASELINES:
            assert call["call"][1][name]["density"] == pytest.approx(density, abs=0.02)
            assert call["mean"][1][name]["density"] == pytest.approx(sum(own) / 2, abs=0.02)
    sides = sides_of({"texts": [found]}, "density", budget="mean")
    assert sides["fixed"] == pytest.approx(sides["flex"], abs=0.02)


def test_adapting_to_layers_is_credited_at_one_budget_only():
    """Whole-layer differences are invisible to a match call by call, where all heads of a call are alike."""
    sharp, flat = (planted_head(kind, torch.Generator().manual_seed(4)) for kind in ("vertical", "isotropic"))
    method = FlexPrefill(block=32, min_budget=None, tau=0.0, approximates=False, stop="union")
    found = compared([sharp, flat.replace(site=replace(flat.site, layer=1))], method, [1024], 0)
    gain = {
        budget: sum(call["flex"][1]["mass"] - call[budget][1]["fixed"]["mass"] for call in found) / 2
        for budget in text.BUDGETS
    }
    assert gain["mean"] > gain["call"] + 0.01


@given(seed=st.integers(0, 50), density=st.floats(0.3, 0.95))
@settings(max_examples=20, deadline=None)
def test_random_blocks_reach_the_density_with_sink_and_diagonal(seed, density):
    call = make_call(90, seed=seed)
    mask = random_blocks(call, density, 8, torch.Generator().manual_seed(seed))
    assert mask.is_causal()
    assert bool(mask.blocks[..., 0].all())
    assert bool(mask.blocks.diagonal(dim1=2, dim2=3).all())
    assert density <= mask.density() < density + 0.03
    heads = mask.blocks[0]
    assert not torch.equal(heads[0], heads[1])


@given(density=st.floats(0.1, 0.99))
@settings(max_examples=20, deadline=None)
def test_the_window_is_the_narrowest_that_reaches_the_density(density):
    call = make_call(90)
    window = window_of_density(call, density, 8)
    assert selection_density(window, call) >= density
    if window.window > 1:
        assert selection_density(replace(window, window=window.window - 1), call) < density


def test_a_fixed_budget_gives_every_head_the_same_number_of_columns_and_diagonals():
    mask = fixed_blocks(METHOD, 3).blocks_of(make_call()).mask.blocks[0]
    last = mask[:, -1].sum(-1)
    assert bool((last >= 3).all())
    assert bool((last <= 6).all())


def test_a_smaller_gamma_that_reads_more_is_counted(monkeypatch):
    assert compared([make_call()], METHOD, [48, 96], 0)[0]["more at smaller gamma"] == 0
    monkeypatch.setattr(text, "GAMMAS", (0.99, 0.95, 0.9, 0.3))
    assert compared([make_call()], METHOD, [48, 96], 0)[0]["more at smaller gamma"] > 0


def test_shorter_lengths_are_the_first_tokens_of_the_call():
    call = make_call()
    short, whole = compared([call], METHOD, [48, 96], 0)[0]["by length"]
    parts = [getattr(call, name)[:, :, :48] for name in ("query", "key", "value")]
    assert short == METHOD.blocks_of(AttentionCall.from_tensors(*parts, causal=True)).density
    assert whole == METHOD.blocks_of(call).density


def test_a_fixed_budget_between_two_counts_is_interpolated():
    call = make_call(300)
    masks = [fixed_blocks(METHOD, count).blocks_of(call).mask for count in (4, 5)]
    low, high = (text.kept(call, Blocks(mask), mask.density()) for mask in masks)
    middle = Baselines(call, METHOD, 0).at((low["density"] + high["density"]) / 2)["fixed"]
    for name, value in middle.items():
        assert value == pytest.approx((low[name] + high[name]) / 2)


def test_what_is_kept_is_a_mean_over_rows_that_stand_everywhere():
    call = make_call(300)
    mask = FlexPrefill(block=16, min_budget=16).blocks_of(call).mask
    kept = text.kept(call, Blocks(mask), mask.density(), late=True)
    true = (call.weights() * mask.to_bool()).sum(-1)
    assert kept["mass"] == pytest.approx(float(true.mean()), abs=0.02)
    assert kept["last"] == pytest.approx(float(true[..., -64:].mean()), abs=1e-5)


def test_a_baseline_is_sparse_in_prefill_and_dense_in_decoding():
    call = make_call()
    for kind in BASELINES:
        method = Prefill(density=0.5, kind=kind, block=8)
        assert 0.5 <= selection_density(method.select(call), call) < 0.58
        assert type(method.select(call.replace(query=call.query[:, :, -1:], causal=False))).__name__ == "Dense"
        assert method.phases == {"prefill"}


def test_an_unknown_head_or_baseline_is_named():
    with pytest.raises(ArgumentError, match="kind: got 'sink'"):
        planted_head("sink", torch.Generator())
    with pytest.raises(ArgumentError, match="kind: got 'best'"):
        Prefill(density=0.5, kind="best", block=8)


def test_a_model_that_does_not_know_the_needle_says_nothing_about_it(tmp_path):
    """The gate: without a dense prefill that ranks the value first, a gain over the baselines is no evidence."""
    values = {"dense": 0.1, "flex": 0.1, "window": 1.0, "random": 1.0, "fixed": 1.0}
    found = {"nll": {name: [x, x + 0.01] * 4 for name, x in values.items()}, "rank one": {"dense": [1.0] * 8}}
    context = Context(size="small", seed=0, out=tmp_path)
    assert recipe._needle_claim(context, found).verdict == "holds"
    found["rank one"]["dense"] = [0.5] * 8
    assert recipe._needle_claim(context, found).verdict == "inconclusive"


def needles_found(**exact):
    """Ten needles at depths 10 and 90 beside a window that reads 0.64 of the triangle, which is 0.4 of the keys."""
    rates = {name: [1.0 if hit else 0.875 for hit in hits] for name, hits in exact.items()}
    return {"rank one": rates, "density": {"window": [0.64] * 20}, "depths": [10, 90] * 10, "nll": {}}


def test_needles_before_the_window_are_far():
    exact, far = exact_needles(needles_found(window=[False, True] * 10))
    assert far == [True, False] * 10
    assert exact["window"] == [0.0, 1.0] * 10
    assert (
        exact_needles(needles_found(window=[True] * 20) | {"depths": [54] * 10 + [56] * 10})[1]
        == [True] * 10 + [False] * 10
    )


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"flex": [True] * 19 + [False]}, "fails"),
        ({"window": [True, True] * 2 + [False, True] * 8}, "fails"),
        ({"dense": [True, False] * 10, "flex": [True] * 20}, "inconclusive"),
    ],
)
def test_needle_accuracy_asks_for_all_of_dense_and_none_of_the_windows_far_ones(tmp_path, changed, verdict):
    right = {name: [True] * 20 for name in ("dense", "flex", "random", "fixed")} | {"window": [False, True] * 10}
    context = Context(size="small", seed=0, out=tmp_path)
    assert recipe._accuracy_claim(context, needles_found(**right | changed)).verdict == verdict


def test_divergences_are_given_by_layer_and_head_and_decide_the_pattern(smoke):
    details = claim(smoke, "gamma").details
    by_layer = details["D by layer and head"]
    assert len(by_layer) == 2
    heads = [value for values in by_layer.values() for value in values]
    assert all(0 <= value <= 0.8326 for value in heads)
    assert len(set(heads)) == len(heads)
    aware = sum(value < FlexPrefill().tau for value in heads) / len(heads)
    assert details["share of query-aware heads"] == [pytest.approx(aware)]


def test_measurements_depend_on_the_seed_alone(tmp_path):
    first, again = (planted(Context(size="smoke", seed=5, out=tmp_path / str(number))) for number in range(2))
    assert first == again


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("flexprefill").check_runnable("full")
    load_recipe("flexprefill").check_runnable("small")
