"""Rubrics, judges, CRAS and agreement: planted marks recovered, bad answers counted, no turn marked twice."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis import diagnose_localize_align as dla
from headway.methods.diagnosis.diagnose_localize_align.judges import read_marks
from headway.parts import Parts

RUBRIC = dla.shipped_rubrics()["assistant"]
GOOD = {name: {"score": 4.5, "justification": "fine"} for name in dla.DIMENSIONS}


def turn(reply="x", index=0, condition="", role="assistant", **rules):
    return dla.Turn(
        conversation="q",
        condition=condition,
        index=index,
        role=role,
        reply=reply,
        question="What?",
        rules=dla.Rules(**{name: tuple(values) for name, values in rules.items()}),
    )


def scored(marks, conversation="q", index=0, condition="", invalid=""):
    scores = dict(zip(dla.DIMENSIONS, marks, strict=True))
    return dla.Scored(conversation, index, "assistant", condition, "made", scores, invalid=invalid)


def answers(*texts):
    """A judge's mouth that says these in turn, and counts."""
    given_texts = itertools.cycle(texts)
    asked = []

    def ask(prompt):
        asked.append(prompt)
        return next(given_texts)

    return ask, asked


def test_the_rule_judge_marks_each_dimension_by_its_rules():
    rules = {
        "answers": ["42"],
        "lexicon": ["theorem", "proof"],
        "forbidden": ["guess"],
        "constraints": ["^So", "!maybe"],
    }
    good = dla.RuleJudge().judge(turn("So by the theorem and its proof: 42", **rules), RUBRIC)
    assert set(good.scores.values()) == {5.0}
    bad = dla.RuleJudge().judge(turn("maybe a guess: 421", **rules), RUBRIC)
    assert bad.scores == {"GA": 1.0, "RC": 1.0, "KBA": 3.0, "CC": 1.0}
    assert "guess" in bad.reasons["KBA"]
    assert set(dla.RuleJudge().judge(turn("anything"), RUBRIC).scores.values()) == {3.0}


def test_terms_are_whole_words_in_any_case():
    judge = dla.RuleJudge()
    assert judge.judge(turn("PARIS.", answers=["paris"]), RUBRIC).scores["GA"] == 5
    assert judge.judge(turn("comparisons", answers=["paris"]), RUBRIC).scores["GA"] == 1
    assert judge.judge(turn("see (c++)", answers=["c++"]), RUBRIC).scores["GA"] == 5


@given(st.sampled_from(["answers", "lexicon", "constraints"]), st.booleans())
def test_keeping_a_rule_never_lowers_a_mark(kind, other):
    rules = {kind: ["alpha", "beta"]}
    some = dla.RuleJudge().judge(turn("alpha" if other else "", **rules), RUBRIC)
    more = dla.RuleJudge().judge(turn("alpha beta", **rules), RUBRIC)
    assert all(more.scores[name] >= some.scores[name] for name in dla.DIMENSIONS)
    assert all(1 <= value <= 5 for one in (some, more) for value in one.scores.values())


@pytest.mark.parametrize(
    "wrap", ["{}", "Here it is: {} Done.", "```json\n{}\n```", "<think>{{}}</think>\n```\n{}\n```"]
)
def test_marks_are_read_out_of_common_wrappings(wrap):
    scores, reasons = read_marks(wrap.format(json.dumps(GOOD)))
    assert scores == dict.fromkeys(dla.DIMENSIONS, 4.5)
    assert reasons["GA"] == "fine"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("four out of five", "no JSON"),
        ("{]}", "Expecting"),
        (json.dumps({**GOOD, "CC": None}), "CC is missing"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "RC"}), "RC is missing"),
        (json.dumps({**GOOD, "GA": {"score": "4"}}), "not a number"),
        (json.dumps({**GOOD, "GA": {"score": True}}), "not a number"),
        (json.dumps({**GOOD, "GA": 5.5}), "outside 1 to 5"),
        (json.dumps({**GOOD, "GA": float("nan")}), "outside 1 to 5"),
    ],
)
def test_an_answer_that_cannot_be_read_is_asked_for_again_and_then_invalid(answer, words):
    ask, asked = answers(answer)
    found = dla.TextJudge(ask, retries=2).judge(turn(), RUBRIC)
    assert len(asked) == found.tries == 3
    assert words in found.invalid
    assert found.scores == {}
    ask, asked = answers(answer, json.dumps(GOOD))
    found = dla.TextJudge(ask, retries=2).judge(turn(), RUBRIC)
    assert (found.tries, found.invalid, found.scores["GA"]) == (2, "", 4.5)


def test_a_judge_is_told_role_rubric_question_and_reply():
    prompt = dla.scoring_prompt(turn("the reply", role="logician"), RUBRIC)
    for part in ("logician", RUBRIC.text(), "What?", "the reply", "3 is the mark for correct, ordinary work"):
        assert part in prompt


class Digits:
    """A tokenizer of single characters."""

    chat_template = None

    def __call__(self, text, **options):
        ids = [ord(c) % 90 for c in text]
        return {"input_ids": torch.tensor([ids]) if options.get("return_tensors") else ids}

    def decode(self, ids):
        return "".join("?" for _ in ids)


@pytest.fixture(scope="module")
def judge():
    model = tiny_host("llama", vocab_size=90, max_position_embeddings=4096)[0]
    return dla.ModelJudge(model, Digits())


def test_a_model_judge_marks_by_its_expected_mark_and_repeats_itself(judge):
    first, again = (judge.judge(turn("some reply"), RUBRIC) for _ in range(2))
    assert first == again
    assert all(1 <= value <= 5 for value in first.scores.values())
    empty = judge.judge(turn("…"), RUBRIC)
    assert list(empty.scores.values()) == pytest.approx([3.0] * 4, abs=1e-5)
    assert judge.judge(turn("z" * 5000), RUBRIC).scores


def test_marks_of_other_weights_are_not_taken_for_those_of_a_model(judge):
    """Two models of one class have no name to tell them apart, and a folder may hold other weights tomorrow."""
    other = dla.ModelJudge(tiny_host("llama", vocab_size=90, max_position_embeddings=4096, seed=1)[0], Digits())
    again = dla.ModelJudge(tiny_host("llama", vocab_size=90, max_position_embeddings=4096)[0], Digits())
    assert other.identity() != judge.identity() == again.identity()
    kept = Parts()
    first = dla.score_turns([turn("some reply")], judge, kept=kept)
    assert dla.score_turns([turn("some reply")], other, kept=kept)[0].scores != first[0].scores


def test_a_judge_that_is_being_trained_marks_without_dropout():
    model = tiny_host("gpt2", vocab_size=90, n_positions=4096, resid_pdrop=0.5, embd_pdrop=0.5)[0]
    judge = dla.ModelJudge(model, Digits())
    still = judge.judge(turn("some reply"), RUBRIC)
    model.train()
    assert dla.ModelJudge(model, Digits()).judge(turn("some reply"), RUBRIC) == still


def test_a_tokenizer_that_splits_marks_is_refused():
    class Split(Digits):
        def __call__(self, text, **options):
            return {"input_ids": [1, 2]}

    with pytest.raises(ArgumentError, match="single tokens"):
        dla.ModelJudge(torch.nn.Linear(1, 1), Split())


def test_roles_find_their_rubric_or_the_general_one():
    assert dla.rubric_for("User Proxy")[0].role == "user_proxy"
    assert dla.rubric_for("user-proxy")[1] is False
    for role in ("poet", "a mathematician who likes numbers"):
        rubric, general = dla.rubric_for(role)
        assert (rubric.role, general) == ("general", True)
    assert set(dla.shipped_rubrics()) == {
        "general", "assistant", "user_proxy", "programmer", "aggregator", "physicist", "mathematician", "logician",
    }  # fmt: skip
    with pytest.raises(ArgumentError, match="general"):
        dla.rubric_for("poet", {"assistant": RUBRIC})


def test_a_rubric_is_written_by_a_judge_with_retries():
    levels = {name: {"1": "bad", "5": "good"} for name in dla.DIMENSIONS}
    ask, asked = answers("no", json.dumps({"rubric": levels}))
    rubric = dla.generate_rubric("poet", ask, description="writes poems")
    assert (rubric.role, len(asked)) == ("poet", 2)
    assert "writes poems" in asked[0]
    assert dla.Rubric.from_dict(rubric.to_dict()) == rubric
    with pytest.raises(ArgumentError, match="3 answers without a rubric"):
        dla.generate_rubric("poet", answers("no")[0])
    with pytest.raises(ArgumentError, match="marks 1 and 5"):
        dla.Rubric("poet", {**levels, "CC": {"1": "bad"}})


def test_cras_is_the_mean_over_dimensions_turns_and_queries():
    rows = [scored([1, 1, 1, 1], "a"), scored([5, 5, 5, 5], "b"), scored([3, 3, 3, 1], "b", 1)]
    found = dla.cras(rows)
    assert found.score.value == pytest.approx((1 + (5 + 2.5) / 2) / 2)
    assert found.unit == pytest.approx((found.score.value - 1) / 4)
    assert found.dimensions["CC"] == pytest.approx((1 + 3) / 2)
    assert (found.queries, found.turns) == (2, 3)
    only = dla.cras(rows, weights={"CC": 2.0})
    assert only.score.value == pytest.approx(2.0)


marks = st.lists(st.floats(1, 5), min_size=4, max_size=4)


@given(st.lists(marks, min_size=1, max_size=6), st.randoms(use_true_random=False), st.integers(0, 3))
def test_cras_stays_in_range_rises_with_each_mark_and_forgets_the_order(rows, random, dimension):
    made = [scored(row, index=i) for i, row in enumerate(rows)]
    value = dla.by_query(made)["q"]
    assert 1 - 1e-9 <= value <= 5 + 1e-9
    mixed = random.sample(made, len(made))
    assert dla.by_query(mixed)["q"] == pytest.approx(value)
    better = [5.0 if d == dimension else mark for d, mark in enumerate(rows[0])]
    assert dla.by_query([scored(better), *made[1:]])["q"] >= value - 1e-9


def test_intervals_of_few_queries_stay_within_the_marks():
    found = dla.cras([scored([1] * 4, "a"), scored([5] * 4, "b")]).score
    assert (found.low, found.high) == (1, 5)


def test_invalid_turns_stay_out_and_are_counted():
    found = dla.cras([scored([4, 4, 4, 4]), scored([0, 0, 0, 0], "b", invalid="no JSON")])
    assert (found.score.value, found.invalid) == (4, 1)
    with pytest.raises(ArgumentError, match="none with valid marks"):
        dla.cras([scored([1, 1, 1, 1], invalid="no JSON")])
    for weights in ({"CC": -1.0}, {"CC": 0.0}, {"XX": 1.0}):
        with pytest.raises(ArgumentError, match="weights"):
            dla.cras([scored([4, 4, 4, 4])], weights=weights)


def test_what_a_conflict_costs_is_taken_over_the_same_queries():
    rows = [
        row
        for i in range(4)
        for row in (scored([4] * 4, f"q{i}", condition="neutral"), scored([3] * 4, f"q{i}", condition="conflict"))
    ]
    alone = scored([1] * 4, "other", condition="conflict")
    assert dla.lost([*rows, alone], "neutral", "conflict").value == pytest.approx(1.0)
    assert dla.lost(rows, "neutral", "missing") is None


def test_marks_are_kept_and_no_turn_is_marked_twice(tmp_path, caplog):
    turns = [turn(f"reply {i}", index=i) for i in range(4)]
    ask, asked = answers(json.dumps(GOOD))
    judge = dla.TextJudge(ask, name="served")

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dla.score_turns(turns, judge, kept=Parts(tmp_path), progress=stop)
    first = next(iter(tmp_path.iterdir()))
    first.write_bytes(first.read_bytes()[:-9])
    found = dla.score_turns(turns, judge, kept=Parts(tmp_path))
    assert len(asked) == 4 + 1
    assert first.name in caplog.text
    assert dla.score_turns(turns, judge, kept=Parts(tmp_path)) == found
    assert len(asked) == 5
    assert len({one.key for one in found}) == 4
    dla.score_turns(turns, dla.TextJudge(ask, name="other"), kept=Parts(tmp_path))
    assert len(asked) == 9


def test_turns_that_differ_in_their_condition_alone_are_two():
    rows = dla.score_turns([turn(condition="neutral"), turn(condition="conflict")], dla.RuleJudge())
    assert [one.condition for one in rows] == ["neutral", "conflict"]
    assert rows[0].key != rows[1].key


def test_marks_that_any_judge_gives_outside_the_range_are_invalid():
    class Wild:
        name = "wild"

        def judge(self, turn, rubric):
            return dla.Judgement({"GA": 9.0, "RC": 3.0, "KBA": 3.0, "CC": 3.0})

        def identity(self):
            return "wild"

    (found,) = dla.score_turns([turn()], Wild())
    assert "GA" in found.invalid


def test_agreement_is_perfect_with_oneself_and_nothing_with_chance():
    random = np.random.default_rng(0)
    table = random.integers(1, 6, (60, 4)).tolist()
    first = [scored(row, index=i) for i, row in enumerate(table)]
    found = dla.agreement(first, first)
    assert found.turns == 60
    assert all(found.kappa[name] == found.weighted_kappa[name] == 1 for name in found.kappa)
    assert all(one.value == 1 for one in found.spearman.values())
    other = [scored(row, index=i) for i, row in enumerate(random.permutation(table).tolist())]
    assert abs(dla.agreement(first, other).kappa["GA"]) < 0.3


def test_kappa_is_that_of_a_known_table():
    # 20 both yes, 5 and 10 apart, 15 both no: observed .7, expected .5.
    first = np.array([1] * 25 + [5] * 25)
    second = np.array([1] * 20 + [5] * 5 + [1] * 10 + [5] * 15)
    assert dla.cohen_kappa(first, second) == pytest.approx(0.4)
    assert dla.cohen_kappa(first, second, quadratic=True) == pytest.approx(0.4)
    near, far = np.array([2, 3, 4, 2]), np.array([5, 1, 1, 5])
    base = np.array([1, 2, 3, 3])
    assert dla.cohen_kappa(base, near, quadratic=True) > dla.cohen_kappa(base, far, quadratic=True)
    assert np.isnan(dla.cohen_kappa(np.array([3, 3]), np.array([3, 3])))


def test_agreement_needs_turns_that_both_marked():
    rows = [scored([1, 2, 3, 4], index=i) for i in range(3)]
    with pytest.raises(ArgumentError, match="2 turns"):
        dla.agreement(rows, rows[:2])
