"""The ACT recipe at smoke size, and its toy."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _act_choice as choice
from headway.evidence.recipes import _act_planting as planting
from headway.evidence.recipes import _act_toy as toy
from headway.evidence.recipes import act as recipe


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("act", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_what_is_exact_holds_at_any_size(smoke):
    assert claim(smoke, "error-scales-with-beta").measured.value < 1e-3
    assert claim(smoke, "recovery-falls-with-beta").others["difference_at_beta_1"].value == 0


def test_a_few_questions_to_a_random_model_say_nothing(smoke):
    for name in ("choice-gain", "choice-against-random", "later-sinks-exist", "first-sink-is-needed"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_the_questions_of_search_and_report_are_told(smoke):
    details = claim(smoke, "choice-gain").details
    assert details["questions"] == {"search": 3, "held out": 3, "shared": 0}
    assert len(details["correct"]["dense"]) == 3


def test_every_answer_of_the_toy_can_be_known():
    batch = toy.recall_batch(40, torch.Generator().manual_seed(0))
    assert batch.ids.shape == (40, toy.LENGTH)
    assert (batch.ids == toy.MARKER).nonzero()[:, 1].tolist() == list(toy.MARKER_PLACES) * 40
    for row, answers in zip(batch.ids.tolist(), batch.answers.tolist(), strict=True):
        pairs = [token - toy.PAIR for token in row if toy.PAIR <= token < toy.ASK]
        values = {pair // toy.VALUES: pair % toy.VALUES for pair in pairs}
        assert len(values) == toy.KEYS
        assert answers == [toy.ANSWER + values[token - toy.ASK] for token in row[-toy.QUESTIONS :]]


def test_planted_sinks_take_the_attention_of_their_heads():
    model = toy.train_recall(2, torch.Generator().manual_seed(0))
    batch = toy.recall_batch(4, torch.Generator().manual_seed(1))
    found = {}

    class Read(headway.door.Observer):
        def observe(self, call, output, lse=None):
            found[call.site.layer] = call.weights()

    with torch.no_grad(), headway.use(model, toy.PlantedSinks(heads=[(0, 2)], strength=20.0), Read()):
        model(input_ids=batch.ids)
    on_markers = (found[0] * (batch.ids == toy.MARKER)[:, None, None]).sum(-1)[:, :, -1]
    assert float(on_markers[:, 2].min()) > 0.99
    assert float(on_markers[:, [0, 1, 3]].max()) < 0.5


def test_a_plant_leaves_its_heads_something_to_give_back():
    """At the limit the median row that asks has `LEFT` outside the markers, with the sinks in place."""
    model = toy.train_recall(60, torch.Generator().manual_seed(0))
    batch = toy.recall_batch(32, torch.Generator().manual_seed(1))
    limit = planting.strongest(model, batch)
    assert set(limit) == set(toy.every_head())
    for head in ((0, 1), (0, 3)):
        read = planting._MarkerShares(batch)
        with torch.no_grad(), headway.use(model, toy.PlantedSinks(heads=[head], strength=limit[head]), read):
            model(input_ids=batch.ids)
        assert float(read.shares[0][:, head[1]].median()) == pytest.approx(1 - planting.LEFT, abs=1e-4)


def test_the_largest_rise_of_a_curve_is_found():
    assert recipe._rises([[1.0, 0.9, 0.2], [0.5, 0.75, 0.0]]) == pytest.approx(0.25)
    assert recipe._rises([[1.0, 0.9, 0.2]]) == pytest.approx(-0.1)


def test_every_plant_fulfils_its_conditions():
    generator = torch.Generator().manual_seed(5)
    model = toy.train_recall(150, generator)
    batch = toy.recall_batch(128, generator)
    clean = float(toy.recalled(model, batch).mean())
    found = planting.plant(model, batch, generator)
    assert found is not None
    limit = planting.strongest(model, batch)
    assert found.strength <= min(limit[head] for head in found.heads)
    damaged = planting._damage(model, batch, found.heads, found.strength)
    assert planting.DAMAGED[0] <= damaged <= planting.DAMAGED[1] < clean
    for head in found.heads:
        rest = [other for other in found.heads if other != head]
        assert planting._damage(model, batch, rest, found.strength) - damaged >= planting.WORTH


def test_an_evaluation_on_questions_of_the_search_would_be_warned_of(caplog, monkeypatch):
    part = choice.Part("smoke", 0, 6, 0.5)
    with caplog.at_level("WARNING"):
        search, held = choice.questions(part)
        assert not set(search) & set(held)
        assert not caplog.text
        monkeypatch.setattr(choice, "split_items", lambda count, share: (list(range(count)), list(range(count))))
        choice.questions(part)
    assert "6 evaluation items were used in the head search" in caplog.text


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("act").check_runnable("full")
