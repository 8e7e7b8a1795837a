"""The recipe at smoke size, and the arena behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headway
from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _sink_utilization as utilization
from headway.evidence.recipes import sink_survey as recipe
from headway.evidence.recipes._sink_arena import ARMS, ArenaLayer, run_arm
from headway.methods.sinks.sink_survey import H2O
from headway.tasks.trigger_averaging import TriggerAttention, run_trigger_averaging, trigger_batch
from tests.door.hosts import CAUSAL, tokens


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


def used(**changes):
    """Numbers under which every rule does what its claim says, by three windows; `changes` replace some."""
    spread = (0.9, 1.0, 1.1)

    def of(value):
        return [value * s for s in spread]

    losses = {"dense": of(3.0), "last": [3.4, 3.8, 4.2], "first and last": of(3.2), "plain": of(3.0)}
    losses |= {name: of(3.1) for name in utilization.CACHES}
    losses |= {"lever": of(2.9), "densest": of(4.0), "least dense": of(5.0), "given": of(6.0), "dropped": of(3.3)}
    losses |= {"register": of(3.0), "masked": of(3.5)} | changes.pop("losses", {})
    caches = {"losses": losses, "budget": 8, "held": [0.9, 1.0, 0.9], "correlation": [0.93, 0.94, 0.95]}
    caches["share"] = {"h2o": [0.5, 0.6, 0.5], "a2sf": [0.2, 0.2, 0.1]}
    editors = {"losses": losses, "massive": [of(100.0), of(2.0)], "bias": -1.0, "bias table": {}, "density": {}}
    editors |= {"neurons": [], "mask": {}, "sink plain": of(0.7), "sink masked": of(0.1)}
    for name, value in changes.items():
        (caches if name in caches else editors)[name.replace("_", " ") if "_" in name else name] = value
    return caches, editors


@pytest.fixture
def judged(tmp_path):
    context = Context(size="smoke", seed=0, out=tmp_path)
    return lambda **changes: {
        claim.id: claim.verdict for claim in utilization.utilization_claims(*used(**changes), context, "a text")
    }


class TestUtilization:
    def test_rules_that_do_what_the_survey_says_hold(self, judged):
        verdicts = judged()
        assert set(verdicts) == set(utilization.UTILIZATION_CRITERIA)
        assert set(verdicts.values()) == {"holds"}

    @pytest.mark.parametrize(
        ("claim", "changes"),
        [
            *((f"cache-{name}", {"losses": {name: [3.9, 4.4, 4.8]}}) for name in utilization.CACHES),
            ("h2o-holds-sink", {"held": [0.1, 0.2, 0.1]}),
            ("a2sf-forgets", {"share": {"h2o": [0.2, 0.2, 0.2], "a2sf": [0.4, 0.5, 0.6]}}),
            ("keydiff-correlation", {"correlation": [0.5, 0.5, 0.6]}),
            ("lever", {"losses": {"lever": [2.9, 3.2, 3.5]}}),
            ("broadcast", {"losses": {"densest": [5.0, 5.6, 6.2]}}),
            ("redistribution", {"losses": {"given": [2.9, 3.2, 3.5]}}),
            ("register", {"massive": [[100.0] * 3, [60.0, 61.0, 62.0]]}),
            ("register", {"losses": {"register": [4.0, 4.4, 4.9]}}),
            ("norm-mask", {"sink_masked": [0.6, 0.7, 0.8]}),
        ],
    )
    def test_a_claim_fails_when_its_rule_does_otherwise(self, judged, claim, changes):
        verdicts = judged(**changes)
        assert {name for name, verdict in verdicts.items() if verdict != "holds"} == {claim}
        assert verdicts[claim] == "fails"

    def test_without_a_massive_state_or_a_sink_the_last_two_say_nothing(self, judged):
        assert judged(massive=[[1.0] * 3, [1.0] * 3])["register"] == "inconclusive"
        assert judged(sink_plain=[0.0] * 3, sink_masked=[0.0] * 3)["norm-mask"] == "inconclusive"

    def test_correlations_are_those_of_numpy(self):
        a, b = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)), torch.arange(27.0).view(3, 9) ** 2
        found = utilization.correlation(a, b)
        for row in range(3):
            assert float(found[row]) == pytest.approx(float(np.corrcoef(a[row], b[row])[0, 1]))
        assert float(utilization.correlation(torch.ones(5), torch.arange(5.0))) == 0

    def test_a_policy_that_keeps_everything_scores_as_one_forward(self):
        model, ids = CAUSAL["llama"](), tokens(1, 20)
        whole = torch.log_softmax(model(input_ids=ids).logits[0, 12:-1], -1)
        expected = -float(whole.gather(1, ids[0, 13:, None]).detach().mean())
        assert utilization.behind(model, ids, 12) == pytest.approx(expected, rel=1e-5)
        with headway.use(model, H2O(budget=64)):
            assert utilization.behind(model, ids, 12) == pytest.approx(expected, rel=1e-5)

    def test_windows_of_the_text_do_not_overlap(self):
        windows = utilization.windows_of(torch.arange(100), 5, 16, torch.Generator().manual_seed(0))
        assert windows.unique().numel() == 5 * 16
        assert bool((windows.diff(dim=1) == 1).all())
