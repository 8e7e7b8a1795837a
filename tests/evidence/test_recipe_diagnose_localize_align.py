"""The Diagnose, Localize, Align recipe at smoke size, and its role language."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _roles_measures as measures
from headway.evidence.recipes import _roles_toy as toy
from headway.evidence.recipes import diagnose_localize_align as recipe
from headway.methods.diagnosis import diagnose_localize_align as method


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return prove("diagnose-localize-align", size="smoke", seed=1, out=out, show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_what_is_exact_holds_at_any_size(smoke):
    assert claim(smoke, "unit-weights-are-dpo").verdict == "holds"


def test_an_untrained_toy_says_nothing(smoke):
    for name in ("focal-layers-are-enough", "focal-beats-other-layers", "attention-weights-help", "agreement-is-kept"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_two_rules_never_give_one_value():
    for case in toy.draw_cases(50, np.random.default_rng(0)) + toy.draw_cases(
        50, np.random.default_rng(1), pairs=toy.HELD_PAIRS, relation=1
    ):
        same = [a == b for a, b in zip(case.obeys, case.disobeys, strict=True)]
        assert same == [False, True] * (toy.ASKED - 1) + [False, True]
        assert case.agreeing[toy.HIGH] == case.agreeing[toy.LOW] == case.conflict[toy.HIGH] != case.conflict[toy.LOW]
        assert len(case.conflict) == toy.PROMPT


def test_held_pairs_are_never_trained_on():
    assert not set(toy.PAIRS) & set(toy.HELD_PAIRS)
    assert len(toy.PAIRS) + len(toy.HELD_PAIRS) == toy.RULES * (toy.RULES - 1)


def test_the_data_disobey_in_four_of_five_conflicts():
    ids = toy.draw_ids(4000, np.random.default_rng(0))
    rules = ids[:, [toy.HIGH, toy.LOW]]
    conflict = (rules[:, 0] != rules[:, 1]) & (rules[:, 1] != toy._ID["none"])
    answers = {}
    for rule in range(toy.RULES):
        for value in range(toy.VALUES):
            answers[toy._ID[f"rule{rule}"], toy.VALUE + value] = toy._answer(rule, np.array([value]))[0]
    low = [answers[int(row[toy.LOW]), int(row[6])] == int(row[toy.PROMPT]) for row in ids[conflict]]
    assert np.mean(low) == pytest.approx(toy.DISOBEYS, abs=0.04)


def test_the_rule_judge_marks_obedience_by_its_tokens():
    (case,) = toy.draw_cases(1, np.random.default_rng(3))
    judge, rubric = method.RuleJudge(), method.shipped_rubrics()["assistant"]
    marks = [judge.judge(case.turn("a", side[:-1]), rubric).scores for side in (case.obeys, case.disobeys)]
    assert (marks[0]["CC"], marks[0]["GA"]) == (5, 5)
    assert (marks[1]["CC"], marks[1]["GA"]) == (1, 1)
    half = (*case.obeys[:2], *case.disobeys[2:-1])
    assert 1 < judge.judge(case.turn("a", half), rubric).scores["CC"] < 5


def test_a_planted_head_is_first_in_an_untrained_toy():
    model = toy.decoder(0).eval()
    case = toy.draw_cases(1, np.random.default_rng(0))[0]

    class Item:
        pair = case.pair()

    found = measures.planted_heads(model, [Item()], [(2, 1)])
    assert found["distribution"] == [0.0]


def test_runs_are_read_at_half_their_steps_and_timed():
    curve = [[1, 0.0, 1.0], [2, 0.5, 2.0], [4, 0.95, 3.0]]
    assert recipe.claims.half_way(curve) == 0.5
    assert measures.steps_to(curve, 4) == 4
    assert measures.steps_to(curve[:2], 4) == 4 + measures.EVERY
    assert measures.follows(curve) == 1
    assert recipe.claims.run_rises(curve)
    assert not recipe.claims.run_rises([[1, 0.0, 1.0]] * 3)


def test_every_answer_is_judged_under_both_rules():
    class Model:
        """A judge that likes short replies whatever the rule."""

        def __init__(self, *_):
            pass

        def mark(self, turn, rubric, dimension):
            assert dimension == "CC"
            return 5.0 - len(turn.reply) / 100

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "ModelJudge", Model)
        found = measures.judged(None, None, list(method.KINDS), 1)
    assert found["rules"] == [5.0, 1.0] * 2 * len(method.KINDS)
    assert found["gain"] == [0.0] * 2 * len(method.KINDS), "what is liked for its form gains nothing"


def test_the_rate_of_each_set_of_layers_is_the_one_under_which_preferred_answers_are_likeliest(monkeypatch):
    class Context:
        size = "smoke"

        def generator(self, name):
            return np.random.default_rng(0)

    asked = []

    def loss(base, layers, pairs, held, settings):
        asked.append((layers, settings.learning_rate))
        assert settings.weights == "uniform"
        assert not {case.conflict for case in pairs} >= {case.conflict for case in held}
        if layers is None:
            return float("inf") if len(asked) % 2 else 1.0
        return abs(np.log(settings.learning_rate / (2.1e-3 if len(layers) == toy.LAYERS else 5e-3)))

    located = {"scores": np.arange(toy.LAYERS * toy.HEADS, dtype=float).reshape(toy.LAYERS, -1), "layers": [2, 4]}
    monkeypatch.setattr(toy, "train", lambda steps, seed: None)
    monkeypatch.setattr(measures, "focal", lambda base, cases: located)
    monkeypatch.setattr(measures, "preferred_loss", loss)
    found = recipe._rates(Context())
    assert {what: found["chosen"][what] for what in ("all", "focal", "random", "least_moved")} == {
        "all": 2e-3, "focal": 5e-3, "random": 5e-3, "least_moved": 5e-3
    }  # fmt: skip
    assert np.isfinite(found["losses"]["full"][str(found["chosen"]["full"])])
    tried = [(layers, rate) for layers, rate in asked if layers]
    assert [rate for _, rate in tried] == 4 * list(recipe.RATES["lora"])
    assert {tuple(layers) for layers, _ in tried} >= {(2, 4), (0, 1), tuple(range(toy.LAYERS))}


def test_the_loss_of_preferred_answers_is_that_of_their_tokens():
    base = toy.train(12, 0)
    pairs = toy.draw_cases(32, np.random.default_rng(0))
    none = measures.preferred_loss(base, [0, 1], pairs, pairs, recipe._settings("uniform", 2, 1e-12, 0))
    with torch.no_grad():
        wanted = [
            base(input_ids=torch.tensor([case.conflict + case.obeys])).logits[0, toy.PROMPT - 1 : -1].log_softmax(-1)
            for case in pairs
        ]
    by_hand = [-float(sum(row[i, t] for i, t in enumerate(c.obeys))) for row, c in zip(wanted, pairs, strict=True)]
    assert none == pytest.approx(np.mean(by_hand), abs=1e-4)
    tuned = toy.tune(base, pairs, 10, 0)
    assert measures.preferred_loss(tuned, [0], pairs, pairs, recipe._settings("uniform", 1, 1e-12, 0)) < none


def test_the_share_of_parameters_is_that_of_all_decoders():
    def run(what, number, parameters, mode="attention"):
        return {
            "what": what, "mode": mode, "number": number, "parameters": parameters, "steps": 4, "layers": [0],
            "compliance": dict.fromkeys(("new inputs", "held pairs", "held relation"), 0.9 - 0.1 * number),
            "agreement": 1.0, "curve": [[1, 0.1, 2.0], [4, 0.9, 4.0]] if what == "focal" else [],
        }  # fmt: skip

    class Context:
        def generator(self, name):
            return np.random.default_rng(0)

    effects = {name: {"focal": 2.0, "by_control": [1.0], "p": 0.5} for name in ("anywhere", "same_layers")}
    made = {
        "agreement": 1.0, "compliance": {"new inputs": 0.1}, "located": {"effects": effects, "heads": [], "layers": []}
    }  # fmt: skip
    runs = [run("focal", i, size, mode) for mode in measures.MODES for i, size in enumerate((10, 30, 20))]
    runs += [run(what, i, 60) for what in ("all", "full", "random", "least_moved") for i in range(2)]
    found = {c.id: c for c in recipe.claims.toy_claims(Context(), [made] * 3, runs, {})}
    share = found["focal-layers-are-enough"].others["share_of_parameters"]
    assert (share.value, share.n) == (pytest.approx((10 / 60 + 30 / 60) / 2), 2)
    assert found["reward-weights-beat-a-constant"].measured.value == 0


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("diagnose-localize-align").check_runnable("full")
