"""The affine-scaled recipe at smoke size, that its arms are paired, and that its planted head is the one it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes._affine_toys import (
    LM_ARMS,
    OPENER,
    TRIGGER_ARMS,
    LMSettings,
    ScaledTrigger,
    _model,
    opened,
    uniform_first_share,
    unigram_entropy,
)
from headway.evidence.recipes.affine_scaled_attention import CRITERIA
from headway.tasks.trigger_averaging import TriggerAttention, trigger_batch

SETTINGS = LMSettings(
    arms=("base",), seeds=1, width=16, layers=2, heads=2, tokens=16, batch=2, steps=2, warmup=1, validation=2
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove(
        "affine-scaled-attention", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False
    )


def test_every_planned_claim_is_measured(smoke):
    assert [claim.id for claim in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_models_that_learned_nothing_decide_nothing(smoke):
    for claim in smoke.claims:
        if claim.id != "first-weight":
            assert claim.verdict == "inconclusive", claim.id


def test_raw_weight_and_share_stand_side_by_side(smoke):
    details = next(claim for claim in smoke.claims if claim.id == "first-weight").details
    assert set(details["affine"][0]) == {"raw", "share", "largest_share", "mass", "entropy", "negative"}


@pytest.mark.parametrize("arm", sorted(LM_ARMS))
def test_arms_start_from_the_weights_of_softmax(arm):
    base, model = dict(_model("base", 0, SETTINGS).named_parameters()), _model(arm, 0, SETTINGS)
    own = dict(model.named_parameters())
    assert set(base) <= set(own)
    assert all(torch.equal(own[name], tensor) for name, tensor in base.items())
    assert not torch.equal(
        own["layers.0.mixer.query.weight"],
        dict(_model(arm, 1, SETTINGS).named_parameters())["layers.0.mixer.query.weight"],
    )


def test_the_softmax_arm_of_the_planted_task_is_the_task_s_own():
    batch = trigger_batch([torch.Generator().manual_seed(0)] * 2, 3)
    for given, expected in zip(
        ScaledTrigger([1, 2], "softmax")(batch.inputs), TriggerAttention([1, 2])(batch.inputs), strict=True
    ):
        torch.testing.assert_close(given, expected)


def test_planted_rows_sum_to_the_running_mean():
    batch = trigger_batch([torch.Generator().manual_seed(0)] * 2, 3)
    head = ScaledTrigger([1, 2], "affine").eval()
    head.average.copy_(torch.tensor([0.3, 0.8]))
    _, weights, _ = head(batch.inputs)
    torch.testing.assert_close(weights.sum(-1), head.average.view(2, 1, 1).expand(2, 3, 16))
    _, weights, _ = head(batch.inputs, without_first=True)
    assert not bool(weights[:, :, 1:, 0].any())


@pytest.mark.parametrize("arm", TRIGGER_ARMS)
def test_seeds_of_the_planted_task_do_not_see_each_other(arm):
    batch = trigger_batch([torch.Generator().manual_seed(s) for s in (5, 6)], 3)
    together = ScaledTrigger([1, 2], arm)(batch.inputs)[0]
    alone = ScaledTrigger([2], arm)(batch.inputs[1:])[0]
    torch.testing.assert_close(together[1:], alone)


def test_an_opener_stands_in_front_of_the_same_text():
    windows = torch.arange(12).view(2, 6)
    with_opener = replace(SETTINGS, opener=True)
    assert opened(windows, with_opener).tolist() == [[OPENER, 0, 1, 2, 3, 4], [OPENER, 6, 7, 8, 9, 10]]
    assert opened(windows, SETTINGS) is windows
    assert _model("affine", 0, with_opener).embed_tokens.weight.shape[0] == OPENER + 1


def test_what_nothing_learned_gives():
    assert uniform_first_share(3) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert unigram_entropy(torch.tensor([0, 1, 2, 3])) == pytest.approx(torch.tensor(4.0).log().item())


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="half a billion parameters"):
        load_recipe("affine-scaled-attention").check_runnable("full")
