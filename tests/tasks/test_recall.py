"""Key-value recall: the object, the pair that is asked for, and who can answer."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.tasks.answering import answer
from headway.tasks.recall import DIGITS, NEW_TOKENS, recall_of_length, recall_sample, recall_samples
from headway.tasks.words import NOUNS
from tests.look.tiny import byte_tokenizer
from tests.tasks.recaller import SURE, VOCABULARY, Recaller

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("kind", ["number", "word", "uuid"])
def test_the_asked_pair_stands_in_the_object_once_and_demonstrations_are_of_other_keys(kind):
    sample = recall_sample(TOKENIZER, 12, np.random.default_rng(1), kind=kind, position=7)
    lines = sample.context.split("{")[1].split("}")[0].split(",\n ")
    key, value = (part.strip('"') for part in lines[7].split(": "))
    assert len(lines) == 12
    assert value == sample.references[0]
    assert sample.context.count(value) == 1
    assert f'"{key}"' in sample.question
    assert sample.context.count(f'"{key}"') == 1
    assert sample.context.count("What is the value of") == 2


def test_an_object_of_a_length_fills_it():
    for sample in recall_samples(TOKENIZER, 500, count=4, seed=2):
        assert 400 < sample.prompt_tokens + sample.max_new_tokens <= 500
        assert sample.meta["pairs"] > 8


def test_depths_of_recall_run_from_end_to_end():
    pairs = [sample.meta["position"] / sample.meta["pairs"] for sample in recall_samples(TOKENIZER, 600, count=5)]
    assert pairs == sorted(pairs)
    assert pairs[0] < 0.2 < 0.7 < pairs[-1]
    last = recall_of_length(TOKENIZER, 500, 0, depth=100).meta
    assert last["position"] == last["pairs"] - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "pairs: got 0"),
        ({"pairs": 5, "position": 5}, "position: got 5"),
        ({"pairs": 5, "kind": "date"}, "kind: got 'date'"),
        ({"pairs": 2, "demonstrations": 2}, "demonstrations: got 2"),
    ],
)
def test_objects_that_cannot_be_asked_about_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        recall_sample(TOKENIZER, random=np.random.default_rng(0), **options)


class Reader(Recaller):
    """Looks the asked key up in what its cache still holds of the object."""

    def _predict(self, tokens):
        text = TOKENIZER.decode(tokens)
        logits = torch.zeros(VOCABULARY)
        asked = re.search(r'The value of "([^"]+)" is "([^"]*)$', text)
        found = asked and re.search(f'"{asked[1]}": "([^"]+")', text)
        if found:
            logits[TOKENIZER(found[1][len(asked[2])])["input_ids"][0]] = SURE
        return logits


def test_a_model_that_looks_up_answers_wherever_the_pair_stands_and_a_window_only_what_is_near():
    samples = list(recall_samples(TOKENIZER, 700, count=4, seed=1))
    for aware in (True, False):
        assert [answer(Reader(), TOKENIZER, s, question_aware=aware).score for s in samples] == [1.0] * 4
    near = [answer(Reader(keep=420), TOKENIZER, s, question_aware=False).score for s in samples]
    assert near[0] == 0.0
    assert near[-1] == 1.0


@pytest.mark.parametrize("kind", ["number", "word", "uuid"])
def test_every_kind_of_value_fits_its_budget_and_scores_one_when_given_back(kind):
    sample = recall_sample(TOKENIZER, 4, np.random.default_rng(3), kind=kind)
    value = sample.references[0]
    assert sample.score(f'{value}"\n') == 1.0
    assert sample.score(f"{value[:-1]}") == 0.0
    assert sample.stop == ('"', "\n")
    if kind == "uuid":
        assert len(TOKENIZER(value)["input_ids"]) <= NEW_TOKENS[kind]


def test_a_number_has_five_digits_and_no_value_or_key_comes_twice():
    sample = recall_sample(TOKENIZER, 60, np.random.default_rng(0))
    pairs = [line.replace('"', "").split(": ") for line in sample.context.split("{")[1].split("}")[0].split(",\n ")]
    keys, values = zip(*pairs, strict=True)
    assert len(set(keys)) == len(set(values)) == 60
    assert {len(value) for value in values} == {DIGITS}


def test_more_pairs_than_nouns_get_adjectives_and_stay_different():
    count = len(NOUNS) + 40
    sample = recall_sample(TOKENIZER, count, np.random.default_rng(0), demonstrations=0)
    keys = [line.split('"')[1] for line in sample.context.split("{")[1].split("}")[0].split(",\n ")]
    assert len(set(keys)) == count
    assert all("-" in key for key in keys)


def test_demonstrations_show_true_answers_in_the_form_that_is_asked_for():
    sample = recall_sample(TOKENIZER, 6, np.random.default_rng(2), demonstrations=3)
    shown = sample.context.split("}")[1].strip().splitlines()
    assert len(shown) == 3
    for line in shown:
        key, value = line.split('"')[1], line.split('"')[5]
        assert f'"{key}": "{value}"' in sample.context
        assert line.startswith(f'What is the value of "{key}"? The value of "{key}" is "')
        assert f'"{key}"' not in sample.question


def test_equal_seeds_give_equal_objects_and_the_objects_of_two_seeds_have_nothing_in_common():
    def contexts(seed):
        return [s.context for s in recall_samples(TOKENIZER, 500, count=3, seed=seed)]

    assert contexts(0) == contexts(0)
    assert not set(contexts(0)) & set(contexts(1))
    assert len(set(contexts(0))) == 3


def test_a_larger_object_of_a_seed_holds_the_pairs_of_the_smaller_one():
    small, large = (recall_of_length(TOKENIZER, tokens, 5).context for tokens in (400, 800))
    for line in small.split("{")[1].split("}")[0].split(",\n "):
        assert line in large


@pytest.mark.parametrize("depth", [-1, 101, float("nan")])
def test_a_depth_that_is_no_percentage_is_refused(depth):
    with pytest.raises(ArgumentError, match="depth: got"):
        recall_of_length(TOKENIZER, 500, 0, depth=depth)


def test_too_few_tokens_or_samples_are_refused_with_what_is_needed():
    with pytest.raises(ArgumentError, match=r"tokens: got 60 for recall, expected at least \d+"):
        recall_of_length(TOKENIZER, 60, 0)
    with pytest.raises(ArgumentError, match="count: got 0"):
        list(recall_samples(TOKENIZER, 500, count=0))
