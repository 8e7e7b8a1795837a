"""The recipe at smoke size, and the arena behind it."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes import sink_survey as recipe
from headway.evidence.recipes._sink_arena import ARMS, ArenaLayer, run_arm
from headway.tasks.trigger_averaging import TriggerAttention, run_trigger_averaging, trigger_batch


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("sink-survey", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def test_every_planned_claim_is_measured(smoke):
    assert {claim.id for claim in smoke.claims} == set(recipe.CRITERIA)
    assert smoke.planned


def test_what_was_not_learned_proves_nothing(smoke):
    verdicts = {claim.id: claim.verdict for claim in smoke.claims}
    assert all(verdicts[f"arena-{name}"] == "inconclusive" for name in ARMS)
    assert verdicts["arena-split"] == "inconclusive"
    assert verdicts["language-arena"] == "inconclusive"


def test_a_random_host_has_nothing_to_explain(smoke):
    verdicts = {claim.id: claim.verdict for claim in smoke.claims}
    assert verdicts["outlier-circuit"] == "inconclusive"
    assert verdicts["implicit-bias-sink"] != "holds"


def test_full_size_asks_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="GPU"):
        load_recipe("sink-survey").check_runnable("full")


@pytest.mark.parametrize("name", ["softmax", "softmax_plus_one", "learned_denominator"])
def test_the_arena_with_a_normaliser_of_the_task_is_the_task(name):
    """The registry's normaliser gives what the task's own one gives, through training."""
    ours = run_arm(name.replace("_", "-"), [3, 8], steps=12)
    own = run_trigger_averaging(name, [3, 8], steps=12)
    assert ours["error"] == pytest.approx(own.error, rel=1e-3)
    assert ours["mass"] == pytest.approx(own.mass, rel=1e-3)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_causal_and_evicts_item_0_from_later_rows_only(name):
    normalizer, gate = ARMS[name]
    model = ArenaLayer([0, 1], normalizer=normalizer, gate=gate).eval()
    batch = trigger_batch([torch.Generator().manual_seed(s) for s in (0, 1)], 4)
    _, weights, _ = model(batch.inputs)
    assert not weights.triu(1).any()
    _, evicted, _ = model(batch.inputs, without_first=True)
    assert not evicted[..., 1:, 0].any()


def test_seeds_do_not_see_each_other():
    together = run_arm("head-gate", [3, 8], steps=10)
    alone = run_arm("head-gate", [8], steps=10)
    assert together["error"][1] == pytest.approx(alone["error"][0], rel=1e-4)
    assert isinstance(ArenaLayer([0], normalizer="softmax"), TriggerAttention)
