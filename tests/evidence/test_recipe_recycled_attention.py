"""The Recycled Attention recipe at smoke size, its planted processes, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _recycled_toys as toys
from headway.evidence.recipes import recycled_attention as recipe
from headway.methods.long_context.recycled_attention import RecycledAttention


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("recycled-attention", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def context(tmp_path) -> Context:
    return Context(size="smoke", seed=0, out=tmp_path)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_a_random_model_on_few_tokens_proves_nothing(smoke):
    for name in ("recovers-mass", "mass-falls-with-stride", "agrees-with-dense"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_every_method_decodes_the_same_tokens(smoke):
    table = claim(smoke, "close-to-dense").details
    assert set(table["perplexity"]) == {
        "dense", "streaming", "recycled", "dynamic", "one choice", "attend", "select"
    }  # fmt: skip
    assert table["full steps, mean over layers"]["recycled"] == 1
    assert table["full steps, mean over layers"]["one choice"] == 0


def test_mass_is_told_by_steps_since_the_full_one(smoke):
    details = claim(smoke, "recovers-mass").details
    for name in ("recycled", "streaming"):
        curve = details[f"{name} by steps since"]
        assert len(curve) == max(recipe.STRIDES) - 1
        assert all(0 < mass <= 1 for mass in curve)


def test_planted_chains_are_followed_by_what_renews_its_choice(smoke):
    found = claim(smoke, "chain-of-keys")
    shares = found.details["share of hops right"]
    assert shares["dense"] == shares["4"] == shares["dynamic"] == 1
    # One choice knows the first hop, which is what the prompt asked for.
    assert shares["one choice"] == pytest.approx(1 / recipe.SMOKE.hops)


def test_a_dense_step_by_hand_is_attention_over_everything():
    attention = toys.LayerByHand(RecycledAttention(budget=4, stride=1))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    outputs = [attention(query[:, :, i : i + 1], key[:, :, i : i + 1], value[:, :, i : i + 1]) for i in range(9)]
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(torch.stack(outputs, 2), want, atol=1e-5, rtol=0)


def test_a_method_that_never_renews_fails_the_chain(tmp_path, monkeypatch):
    monkeypatch.setattr(RecycledAttention, "_due", lambda self, query, layer: torch.zeros(1, dtype=torch.bool))
    shares = toys.chains(context(tmp_path), 1, 4)
    assert shares["4"] == [0.25]


def test_short_strides_recover_what_long_ones_lose(tmp_path):
    found = toys.planted_drift(context(tmp_path), 2)
    means = [sum(found[str(stride)]) for stride in toys.PLANTED_STRIDES]
    assert means == sorted(means, reverse=True)
    assert max(found["one choice"]) < 0.35
    assert max(found["random"]) < 0.1


def test_bursts_have_as_many_full_steps_on_both_sides(tmp_path):
    found = toys.bursty_drift(context(tmp_path), 2)
    assert all(full > 3 for full in found["full"])
    assert set(found) == {"dynamic", "fixed", "full"}


def test_the_curve_is_drawn(smoke):
    assert (smoke.folder / "plots" / "recovered-mass.html").exists()


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("recycled-attention").check_runnable("full")
    load_recipe("recycled-attention").check_runnable("small")
