"""Planted texts: the rationale decides the label, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.tasks import planted_rationale as planted
from headway.tasks.planted_rationale import RULES, VOCABULARY, make_texts, pad_batch, token_name
from headway.tasks.planted_reviews import ASPECTS, NEUTRAL, OPINIONS, make_reviews


def words(text) -> list[str]:
    return [token_name(int(t)).rstrip("0123456789") for t in text.ids]


def label_of(text) -> int:
    """The label by the rule, from the words alone."""
    said = words(text)
    if text.rule == "additive":
        weight = {"good": 2, "bad": -2, "fine": 1, "poor": -1}
        return int(sum(weight.get(word, 0) for word in said) > 0)
    if text.rule == "conjunction":
        return int("good" in said and "bad" in said)
    if text.rule == "negation":
        (place,) = (i for i, word in enumerate(said) if word in ("good", "bad"))
        return int((said[place] == "good") != (said[place - 1] == "not"))
    one, other = (token_name(int(t)) for t in text.ids if token_name(int(t)).startswith(("good", "bad")))
    return int(one == other)


@pytest.mark.parametrize("rule", RULES)
def test_the_label_follows_the_rule(rule):
    texts = make_texts(rule, 200, np.random.default_rng(0))
    assert [label_of(t) for t in texts] == [t.label for t in texts]
    assert sum(t.label for t in texts) == 100


@pytest.mark.parametrize("rule", RULES)
def test_the_rationale_is_what_decides(rule):
    for text in make_texts(rule, 100, np.random.default_rng(1)):
        if text.rationale is None:
            assert (rule, text.label) == ("conjunction", 0)
            continue
        assert not (text.rationale & text.special).any()
        # Other words in place of all the rest leave the label as it is.
        changed = text.ids.clone()
        rest = torch.from_numpy(~text.rationale & ~text.special)
        if rule == "negation":
            rest &= torch.tensor([word != "not" for word in words(text)])
        changed[rest] = planted.FIRST_FILLER
        object.__setattr__(text, "ids", changed)
        assert label_of(text) == text.label


def test_a_free_negator_is_no_rationale():
    for text in make_texts("negation", 60, np.random.default_rng(2)):
        said = words(text)
        place = next(i for i, word in enumerate(said) if word in ("good", "bad"))
        assert said.count("not") == 1
        negated = said[place - 1] == "not"
        assert text.rationale.sum() == 1 + negated


def test_lengths_and_tokens_stay_in_their_range():
    texts = make_texts("additive", 50, np.random.default_rng(0), lengths=(5, 9))
    assert {len(t.ids) for t in texts} == {7, 8, 9, 10, 11}
    assert all(int(t.ids.min()) >= 0 and int(t.ids.max()) < VOCABULARY for t in texts)
    assert texts[0].tokens[0] == "[CLS]"
    assert texts[0].tokens[-1] == "[SEP]"


def test_a_batch_is_padded_behind():
    texts = make_texts("additive", 6, np.random.default_rng(0))
    ids, mask, labels = pad_batch(texts)
    assert labels.tolist() == [t.label for t in texts]
    for row, seen, text in zip(ids, mask, texts, strict=True):
        assert torch.equal(row[seen], text.ids)
        assert (row[~seen] == planted.PAD).all()
        assert seen.sum() == len(text.ids)


def test_every_token_has_its_own_name():
    assert len({token_name(t) for t in range(VOCABULARY)}) == VOCABULARY


def test_bad_arguments_are_refused():
    random = np.random.default_rng(0)
    with pytest.raises(ArgumentError, match="Did you mean 'negation'"):
        make_texts("negations", 4, random)
    with pytest.raises(ArgumentError, match="lengths"):
        make_texts("pair", 4, random, lengths=(2, 9))
    with pytest.raises(ArgumentError, match="count"):
        make_texts("pair", 0, random)
    with pytest.raises(ArgumentError, match="count"):
        make_reviews(0, random)
    with pytest.raises(ArgumentError, match="neutral"):
        make_reviews(3, random, neutral=(2, len(NEUTRAL) + 1))


def test_reviews_are_decided_by_their_opinions_alone():
    reviews = make_reviews(120, np.random.default_rng(0))
    assert sum(r.label for r in reviews) == 60
    for review in reviews:
        said = [review.text[a:b] for a, b in review.rationale]
        assert 1 <= len(said) <= 2
        assert set(said) <= set(OPINIONS[review.label])
        rest = review.text
        for word in said:
            rest = rest.replace(word, "")
        assert not any(word in rest for side in OPINIONS for word in side)


def test_what_does_not_decide_stands_in_reviews_of_both_kinds():
    reviews = make_reviews(400, np.random.default_rng(1))
    for label in (0, 1):
        text = " ".join(r.text for r in reviews if r.label == label)
        assert all(part in text for part in (*ASPECTS, *NEUTRAL))
    assert not set(OPINIONS[0]) & set(OPINIONS[1])
