"""Scores, classes, judges, controls, and the skew of retrieval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.methods.diagnosis.clip_ccs import (
    Lexicon,
    PromptJudge,
    PromptLabeller,
    by_class,
    chance_skew,
    concentrated_ratio,
    consistency_class,
    equal_count,
    groups_of,
    histogram,
    layer_matched,
    lexicon,
    mean_max_skew,
    of_concept,
    parse_answer,
    retrieval_skews,
    right,
    score_head,
    skew,
    text_span,
)

COLOURS = {"red paint": "colour", "navy wall": "colour", "pink": "colour", "lime": "colour", "teal": "colour"}
KNOWN = Lexicon({**COLOURS, "a ball": "shape", "a box": "shape", "at the top": "position", "three": "count"})


def head(texts, place=(0, 0), **options):
    return score_head(place, texts, labeller=KNOWN.label, judges={"exact": KNOWN}, **options)


def test_five_texts_of_one_concept_score_five():
    found = head(list(COLOURS))
    assert (found.score, found.kind, found.concept) == (5, "high", "colour")


def test_the_concept_is_that_of_most_texts_and_the_first_on_a_tie():
    assert head(["a ball", "red paint", "pink", "at the top", "three"]).concept == "colour"
    assert head(["a ball", "red paint", "at the top"]).concept == "shape"


def test_scores_are_whole_and_shares_sum_to_one():
    heads = [
        head(list(COLOURS)),
        head(["a ball", "red paint", "at the top", "three", "pink"], (0, 1)),
        head(["a ball", "a box", "red paint", "pink", "lime"], (1, 0)),
    ]
    assert [h.score for h in heads] == [5, 2, 3]
    assert histogram(heads) == pytest.approx((0, 0, 1 / 3, 1 / 3, 0, 1 / 3))
    assert sum(histogram(heads)) == pytest.approx(1)
    assert by_class(heads) == {"high": [(0, 0)], "moderate": [(1, 0)], "low": [], "between": [(0, 1)]}
    assert of_concept(heads, "colour") == [(0, 0), (1, 0)]


def test_the_papers_classes():
    assert [consistency_class(k, 5) for k in range(6)] == ["low", "low", "between", "moderate", "between", "high"]
    with pytest.raises(ArgumentError):
        consistency_class(6, 5)


def test_missing_texts_count_as_no_fit():
    found = head(["red paint", "pink"], asked=5)
    assert (found.score, found.kind) == (2, "between")
    assert head([], asked=5).score == 0


def test_the_concentrated_ratio():
    colour, shape = list(COLOURS), ["a ball"]
    assert concentrated_ratio([head(colour), head(colour, (0, 1)), head(shape, (0, 2))]) == pytest.approx(1 / 3)
    assert concentrated_ratio([head(colour), head(shape, (0, 2))]) == 0
    assert math.isnan(concentrated_ratio([head(["a ball", "pink"])]))


@pytest.mark.parametrize(
    ("answer", "meant"),
    [("yes", True), (" No.\n", False), (True, True), ("Yes, it does", None), ("", None), (None, None), (1, None)],
)
def test_answers_are_parsed_strictly(answer, meant):
    assert parse_answer(answer) is meant


def test_judges_vote_and_ties_and_abstentions_are_counted():
    answers = {"a": {"x": "yes", "y": "yes", "z": "maybe"}, "b": {"x": "yes", "y": "no", "z": "perhaps so"}}
    judges = {name: lambda concept, text, said=said: said[text] for name, said in answers.items()}
    found = score_head((1, 2), ["x", "y", "z"], labeller=lambda texts: "letters", judges=judges)
    assert found.fits == (True, False, False)
    assert (found.ties, found.abstentions) == (1, 2)
    assert found.verdicts["a"] == (True, True, None)
    third = {**judges, "c": lambda concept, text: True}
    assert score_head((1, 2), ["x", "y", "z"], labeller=lambda t: "l", judges=third).fits == (True, True, True)


def test_scoring_needs_a_judge_and_a_label():
    with pytest.raises(ArgumentError, match="judges: got none"):
        score_head((0, 0), ["a"], labeller=KNOWN.label, judges={})
    with pytest.raises(ArgumentError, match="labeller: got ''"):
        score_head((0, 0), ["a"], labeller=lambda texts: "", judges={"exact": KNOWN})
    with pytest.raises(ArgumentError, match="texts: got none"):
        score_head((0, 0), [], labeller=KNOWN.label, judges={"exact": KNOWN})


def test_everyday_words_judge_what_they_know_and_abstain_on_the_rest():
    words = lexicon()
    assert words("colour", "a bright red wall") is True
    assert words("animal", "a bright red wall") is False
    assert words("colour", "zygote") is None
    assert words.label(["zygote"]) == "none"
    assert words.label(["a dog", "two cats and a cat", "a red thing"]) == "animal"


def test_a_model_may_label_and_judge():
    asked = []

    def model(prompt):
        asked.append(prompt)
        return "Colour.\nBecause…" if prompt.endswith("Theme:") else "Yes."

    found = score_head((0, 0), ["pink", "lime"], labeller=PromptLabeller(model), judges={"m": PromptJudge(model)})
    assert (found.concept, found.score) == ("colour", 2)
    assert "pink; lime" in asked[0]
    assert "“colour”" in asked[1]
    assert "“pink”" in asked[1]
    with pytest.raises(ArgumentError, match="expected a theme"):
        PromptLabeller(lambda prompt: "I think that all of these texts are about colour")(["pink"])


def test_equal_counts_of_both_classes():
    generator = torch.Generator().manual_seed(0)
    high, low = [(3, 0), (3, 1), (2, 4)], [(0, 0), (1, 1)]
    some, others = equal_count(high, low, generator)
    assert len(some) == len(others) == 2
    assert set(some) <= set(high)
    assert set(others) <= set(low)
    with pytest.raises(ArgumentError, match="at least one of each"):
        equal_count(high, [], generator)


def test_controls_have_as_many_heads_in_every_layer_and_none_of_the_class():
    generator = torch.Generator().manual_seed(0)
    high = [(2, 4), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]
    others = [(layer, head) for layer in (1, 2, 3) for head in range(8) if (layer, head) not in high]
    pairs = layer_matched(high, others, generator, draws=6)
    assert len(pairs) == 6
    for some, control in pairs:
        assert [layer for layer, _ in some] == [layer for layer, _ in control] == [2, 3, 3, 3]
        assert set(some) <= set(high)
        assert set(control) <= set(others)
    assert len({tuple(some) for some, _ in pairs}) > 1
    assert all(some == [(2, 4)] for some, _ in layer_matched([(2, 4)], others, generator))


def test_classes_that_cannot_be_compared_are_refused():
    generator = torch.Generator()
    with pytest.raises(ArgumentError, match="share no layer"):
        layer_matched([(0, 1)], [(1, 1)], generator)
    with pytest.raises(ArgumentError, match=r"\(1, 1\) in both"):
        layer_matched([(1, 1)], [(1, 1), (1, 2)], generator)


def test_right_checks_its_labels():
    classes = torch.eye(3)
    assert right(classes[[0, 2, 1]], classes, torch.tensor([0, 2, 2])).tolist() == [True, True, False]
    with pytest.raises(ArgumentError, match="labels"):
        right(classes, classes, torch.tensor([0, 1, 3]))


def test_groups_are_lists_of_their_own():
    groups = groups_of(["b", "a", "b"])
    assert groups == {"a": [1], "b": [0, 2]}
    assert len({id(members) for members in groups.values()}) == 2


def test_a_list_like_the_population_has_no_skew():
    found = skew(torch.tensor([0, 1, 10, 11]), {"a": range(10), "b": range(10, 20)})
    assert found.by_group == {"a": 0.0, "b": 0.0}
    assert found.largest == found.smallest == 0


def test_an_empty_group_counts_as_half_a_picture():
    found = skew(torch.arange(10), {"a": range(10), "b": range(10, 20)})
    assert found.by_group["a"] == pytest.approx(math.log(2))
    assert found.by_group["b"] == pytest.approx(math.log((1 / 20) / 0.5))
    assert found.counts == {"a": 10, "b": 0}
    assert found.largest >= 0 > found.smallest


def test_the_order_of_the_images_does_not_permute_the_population():
    labels = ["late"] * 2 + ["early"] * 6
    found = skew(torch.tensor([0, 2, 3, 4]), groups_of(labels))
    assert found.by_group["late"] == pytest.approx(0)
    assert found.by_group["early"] == pytest.approx(0)


def test_the_mean_over_prompts_does_not_grow_with_their_number():
    images = torch.eye(20)
    groups = {"a": range(10), "b": range(10, 20)}
    prompts = {f"prompt {i}": images[:10].sum(0) for i in range(8)}
    skews = retrieval_skews(images, prompts, groups, top=10)
    found = mean_max_skew(skews, generator=np.random.default_rng(0))
    assert found.value == pytest.approx(math.log(2))
    assert found.n == 8


def test_short_lists_are_skewed_by_chance_and_long_ones_are_not():
    groups = groups_of([str(i % 6) for i in range(600)])
    random = np.random.default_rng(0)
    drawn = [skew(torch.from_numpy(random.permutation(600)[:10]), groups).largest for _ in range(400)]
    assert chance_skew(groups, 10, generator=random) == pytest.approx(np.mean(drawn), abs=0.05)
    assert chance_skew(groups, 10, generator=random) > 0.5
    assert chance_skew(groups, 600, generator=random) == pytest.approx(0)
    with pytest.raises(ArgumentError, match="top: got 601"):
        chance_skew(groups, 601, generator=random)


def test_bad_groups_and_lists_are_refused():
    with pytest.raises(ArgumentError, match="two or more groups"):
        skew(torch.tensor([0]), {"a": [0, 1]})
    with pytest.raises(ArgumentError, match="in two groups"):
        skew(torch.tensor([0]), {"a": [0, 1], "b": [1, 2]})
    with pytest.raises(ArgumentError, match="distinct"):
        skew(torch.tensor([0, 0]), {"a": [0, 1], "b": [2]})
    with pytest.raises(ArgumentError, match="top: got 9"):
        retrieval_skews(torch.eye(3), {"p": torch.ones(3)}, {"a": [0], "b": [1, 2]}, top=9)
    with pytest.raises(ArgumentError, match="prompts: got none"):
        retrieval_skews(torch.eye(3), {}, {"a": [0], "b": [1, 2]}, top=1)


def test_five_identical_texts_score_five():
    found = head(["red paint"] * 5)
    assert (found.score, found.kind, found.concept) == (5, "high", "colour")
    unknown = head(["something"] * 5)
    assert (unknown.score, unknown.abstentions) == (0, 5), "nobody knows the text, so nobody may say that it fits"


def described(x, bank, concepts):
    """The score of a head from what it wrote, described by five texts of the bank."""
    texts = list(concepts)
    span = text_span(x, bank, texts=5)
    known = Lexicon(concepts)
    return score_head((0, 0), [texts[i] for i in span.chosen], labeller=known.label, judges={"exact": known}, asked=5)


def test_a_head_that_writes_one_concept_scores_five_and_one_that_writes_mixtures_less():
    """Five concepts of eight values each, three phrases a value; phrases lie about the direction of their value."""
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.qr(torch.randn(48, 40, generator=generator))[0].T
    names = [f"{concept} {value} {phrase}" for concept in "abcde" for value in range(8) for phrase in range(3)]
    bank = values.repeat_interleave(3, 0) + 0.1 * torch.randn(120, 48, generator=generator)
    concepts = {name: name[0] for name in names}
    for number, concept in enumerate("abcde"):
        own = torch.randn(200, 8, generator=generator) @ values[8 * number : 8 * number + 8]
        found = described(own, bank, concepts)
        assert (found.score, found.kind, found.concept) == (5, "high", concept)
    mixtures = [described(torch.randn(200, 40, generator=generator) @ values, bank, concepts).score for _ in range(20)]
    assert max(mixtures) < 5
    assert np.mean(mixtures) <= 2.5
