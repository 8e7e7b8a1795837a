"""The recipe at smoke size: every claim is there, the planted truth is found, and a random model proves nothing."""

from __future__ import annotations

import pytest

from headway.evidence import Run, prove
from headway.evidence.recipes import secondary_sinks as recipe


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prove("secondary-sinks", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def test_every_planned_claim_is_measured(smoke: Run):
    assert {claim.id for claim in smoke.claims} == set(recipe.CRITERIA)
    assert smoke.planned


def test_what_has_no_spread_in_a_planted_model_holds_at_any_size(smoke: Run):
    verdicts = {claim.id: claim.verdict for claim in smoke.claims}
    exact = ("planted-detection", "same-ids-stay-clean", "lifetime-rises-with-norm", "score-rises-with-norm")
    assert [verdicts[name] for name in exact] == ["holds"] * 4
    clamp = next(c for c in smoke.claims if c.id == "clamping-removes-the-sink")
    assert (clamp.others["flags"].value, clamp.others["change"].value) == (0, 0)


def test_the_sweep_spans_the_lives_that_it_plans(smoke: Run):
    sweeps = next(c for c in smoke.claims if c.id == "score-rises-with-norm").details["sweeps"]
    for sweep in sweeps:
        lives = [row["lifetime"] for row in sweep]
        assert lives == pytest.approx(recipe.SWEPT_LIVES, abs=1.5)


def test_a_random_model_has_no_primary_and_nothing_that_hangs_on_it(smoke: Run):
    claims = {claim.id: claim for claim in smoke.claims}
    assert claims["model-has-primary"].verdict == "fails"
    assert claims["model-has-primary"].details["by text"][0]["reason"].startswith("no primary sink found")
    for name in ("model-few-levels", "model-stage-profile", "model-score", "model-clamp"):
        assert claims[name].verdict == "inconclusive"
        assert "requirement not met" in claims[name].reason
