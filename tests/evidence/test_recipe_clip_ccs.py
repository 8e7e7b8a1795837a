"""The CLIP concept recipe at smoke size, and the encoders that it builds."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import prove
from headway.evidence.recipes import _concepts_planted as planted
from headway.evidence.recipes import clip_ccs as recipe
from headway.hosts.fingerprint import fingerprint
from headway.methods.diagnosis.clip_ccs import TextBank, decompose, tiny, tower
from headway.tasks.attribute_scenes import CONCEPTS, make_scenes, phrase_bank


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("clip-ccs", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_what_is_exact_holds_at_any_size(smoke):
    assert claim(smoke, "parts-add-up").verdict == "holds"


def test_an_untrained_model_says_nothing(smoke):
    for name in set(recipe.CRITERIA) - {"parts-add-up"}:
        assert claim(smoke, name).verdict == "inconclusive"


@pytest.fixture(scope="module")
def model():
    return tiny.untrained(0).eval()


@pytest.fixture(scope="module")
def bank(model):
    """The phrases with directions of their own: every concept has six dimensions that no other uses."""
    generator = torch.Generator().manual_seed(0)
    phrases = phrase_bank()
    vectors = torch.zeros(len(phrases), 64)
    for row, phrase in enumerate(phrases):
        start = 6 * CONCEPTS.index(phrase.concept)
        vectors[row, start : start + 6] = torch.randn(6, generator=generator)
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    known = {phrase.text: phrase.concept for phrase in phrases}
    return TextBank(tuple(known), unit, known, fingerprint(model))


@pytest.fixture(scope="module")
def batches():
    return list(tiny.pixels(make_scenes(60, seed=0).images).split(30))


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_head_that_writes_one_concept_scores_five(model, bank, batches, concept):
    built = planted.writing(model, (3, 2), planted.concept_directions(bank, concept))
    found = planted.scored(built, (3, 2), batches, bank)
    assert (found.concept, found.score, found.kind) == (concept, 5, "high")


def test_heads_that_write_mixtures_score_low(model, bank, batches):
    generator = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(6):
        built = planted.writing(model, (3, 2), planted.mixed_directions(bank, CONCEPTS, generator))
        scores.append(planted.scored(built, (3, 2), batches, bank).score)
    assert sorted(scores)[len(scores) // 2] <= 2
    assert max(scores) < 5


def test_a_built_head_writes_where_it_is_told(model, bank, batches):
    directions = planted.concept_directions(bank, "shape")
    built = planted.writing(model, (3, 2), directions)
    found = decompose(tower(built), batches[0])
    assert found.error < 1e-4
    wrote = (found.heads[:, 3, 2] - found.heads[:, 3, 2].mean(0)).double()
    inside = wrote @ directions.T @ directions
    assert (wrote - inside).norm() < 0.2 * wrote.norm()
    plain = decompose(tower(model), batches[0])
    length = [tower(m).embed(batches[0]).norm(dim=-1).view(-1, 1) for m in (built, model)]
    torch.testing.assert_close(found.heads[:, 2, 1] * length[0], plain.heads[:, 2, 1] * length[1], atol=0.2, rtol=0.3)


def test_a_confined_head_writes_of_its_concept_alone_and_the_bound_is_idempotent(model, bank, batches):
    import copy

    built = copy.deepcopy(model)
    basis = planted.concept_directions(bank, "shape")
    planted.confine(built, {(3, 1): basis})
    once = tower(built).outputs[3].weight.clone()
    planted.confine(built, {(3, 1): basis})
    torch.testing.assert_close(tower(built).outputs[3].weight, once, atol=1e-6, rtol=1e-5)
    found = decompose(tower(built), batches[0])
    assert found.error < 1e-4
    wrote = (found.heads[:, 3, 1] - found.heads[:, 3, 1].mean(0)).double()
    before = decompose(tower(model), batches[0]).heads[:, 3, 1].double()
    before = before - before.mean(0)

    def outside(x):
        return float((x - x @ basis.T @ basis).norm() / x.norm())

    assert outside(wrote) < 0.35 < outside(before)
    others = [h for h in range(8) if h != 1]
    kept = tower(built).outputs[3].weight.unflatten(1, (8, -1))[:, others]
    torch.testing.assert_close(kept, tower(model).outputs[3].weight.unflatten(1, (8, -1))[:, others])


def test_training_on_keeps_the_bound_and_the_bank(model, bank):
    built = planted.specialised(model, bank, ("colour", "shape"), layer=3, steps=2, rate=1e-3, seed=0)
    part, plain = tower(built), tower(model)
    reach = part.projection.weight.double() * part.norm.weight.double()
    for head, concept in enumerate(("colour", "shape")):
        basis = planted.concept_directions(bank, concept)
        wrote = reach @ part.outputs[3].weight[:, head * 12 : (head + 1) * 12].double()
        torch.testing.assert_close(basis.T @ (basis @ wrote), wrote, atol=1e-5, rtol=1e-4)
    assert not torch.equal(part.outputs[0].weight, plain.outputs[0].weight)
    for name, value in model.text_model.state_dict().items():
        assert torch.equal(built.text_model.state_dict()[name], value), name
