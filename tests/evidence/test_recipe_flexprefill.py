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
from headway.evidence.recipes import flexprefill as recipe
from headway.evidence.recipes.flexprefill import (
    CRITERIA,
    Comparison,
    Prefill,
    fixed_blocks,
    planted_head,
    random_blocks,
    window_of_density,
)
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


def test_baselines_are_measured_at_the_density_of_the_method(smoke):
    densities = claim(smoke, "mass").details["density"]
    for name in recipe.BASELINES:
        assert densities[name][0] == pytest.approx(densities["flex"][0], rel=0.02)


def test_density_by_gamma_is_drawn(smoke):
    assert (smoke.folder / "plots" / "density-by-gamma.html").exists()


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
    watch = Comparison(METHOD, [0], [48, 96], 0)
    watch.observe(make_call(), torch.empty(0))
    assert watch.result()[0]["more at smaller gamma"] == 0
    monkeypatch.setattr(recipe, "GAMMAS", (0.99, 0.95, 0.9, 0.3))
    watch.observe(make_call(), torch.empty(0))
    assert watch.result()[1]["more at smaller gamma"] > 0


def test_shorter_lengths_are_the_first_tokens_of_the_call():
    watch = Comparison(METHOD, [0], [48, 96], 0)
    call = make_call()
    watch.observe(call, torch.empty(0))
    short, whole = watch.result()[0]["by length"]
    parts = [getattr(call, name)[:, :, :48] for name in ("query", "key", "value")]
    assert short == METHOD.blocks_of(AttentionCall.from_tensors(*parts, causal=True)).density
    assert whole == METHOD.blocks_of(call).density


def test_what_is_kept_is_a_mean_over_rows_that_stand_everywhere():
    call = make_call(300)
    mask = FlexPrefill(block=16, min_budget=16).blocks_of(call).mask
    kept = recipe._kept(call, Blocks(mask), mask.density())
    true = (call.weights() * mask.to_bool()).sum(-1)
    assert kept["mass"] == pytest.approx(float(true.mean()), abs=0.02)
    assert kept["last"] == pytest.approx(float(true[..., -64:].mean()), abs=1e-5)


def test_a_baseline_is_sparse_in_prefill_and_dense_in_decoding():
    call = make_call()
    for kind in ("window", "random"):
        method = Prefill(density=0.5, kind=kind, block=8)
        assert selection_density(method.select(call), call) == pytest.approx(0.5, abs=0.05)
        assert type(method.select(call.replace(query=call.query[:, :, -1:], causal=False))).__name__ == "Dense"
        assert method.phases == {"prefill"}


def test_an_unknown_head_is_named():
    with pytest.raises(ArgumentError, match="kind: got 'sink'"):
        planted_head("sink", torch.Generator())


def test_measurements_depend_on_the_seed_alone(tmp_path):
    first, again = (recipe._planted(Context(size="smoke", seed=5, out=tmp_path / str(number))) for number in range(2))
    assert first == again


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("flexprefill").check_runnable("full")
    load_recipe("flexprefill").check_runnable("small")
