"""The planted host attends as it is said to, and planted texts hold their facts where they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headway
from headway.errors import ArgumentError
from headway.tasks.planted_retrieval import RETRIEVAL_HEAD, answering_host, chain_text, planted_host, planted_text


def test_the_retrieval_head_reads_the_same_word_and_the_others_everything():
    model, tokenizer = planted_host(positions=64, layers=3)
    ids = tokenizer("w1 n5 w2 w3 w4 w6 w7 n5", return_tensors="pt")["input_ids"]
    with headway.capture(model, what=("weights",)) as captured, torch.no_grad():
        model(ids)
    last = captured.result()[2]["weights"][0]
    assert float(last[RETRIEVAL_HEAD, -1, [1, -1]].sum()) > 0.98
    torch.testing.assert_close(last[1 - RETRIEVAL_HEAD, -1], torch.full((8,), 1 / 8))
    torch.testing.assert_close(captured.result()[0]["weights"][0, :, -1], torch.full((2, 8), 1 / 8))


@pytest.mark.parametrize("depths", [(0.0,), (1.0,), (0.2, 0.5, 0.9)])
def test_facts_stand_at_their_depths_under_names_of_their_own(depths):
    planted = planted_text(1000, depths, np.random.default_rng(0))
    words = planted.text.split()
    assert 1000 <= len(words) < 1000 + 20 * (1 + len(depths))
    for depth, number in zip(depths, planted.needles, strict=True):
        assert abs(number / len(planted.sentences) - depth) < 0.05
        name = planted.sentences[number].split()[3]
        assert words.count(name) == 1
        assert name in planted.question.split()


def test_a_chain_shows_its_first_hop_through_the_second_alone():
    chain = chain_text(600, np.random.default_rng(1))
    first, second = (chain.sentences[number].split() for number in chain.needles)
    asked = chain.question.split()[-2]
    assert second[:3] == [asked, "leads", "to"]
    assert first[3] == second[3]
    assert first[3] not in chain.question
    assert chain.needles[0] < chain.needles[1]


def test_texts_depend_on_the_seed_alone():
    one, two = (planted_text(300, [0.5], np.random.default_rng(3)) for _ in range(2))
    assert one == two


@pytest.mark.parametrize(("tokens", "depths"), [(0, [0.5]), (100, []), (100, [1.5]), (100, [0.9, 0.1])])
def test_texts_that_cannot_be_made_are_refused(tokens, depths):
    with pytest.raises(ArgumentError, match="depths: got"):
        planted_text(tokens, depths, np.random.default_rng(0))


def test_the_answering_host_says_what_stood_two_places_behind_the_name():
    model, tokenizer = answering_host(positions=64)
    text = "w1 w2 the code of n5 is v7 . the code of n9 is v3 . w4 w5 the code of"
    for name, value in (("n5", "v7"), ("n9", "v3")):
        ids = tokenizer(f"{text} {name}", return_tensors="pt")["input_ids"]
        with headway.capture(model, what=("weights",)) as captured, torch.no_grad():
            said = model(ids).logits[0, -1].argmax()
        assert tokenizer.decode(said) == value
        read = captured.result()[1]["weights"][0, 0, -1]
        assert tokenizer.decode(ids[0, int(read.argmax())]) == value
        assert float(read.max()) > 0.98
    # The first layer hands every word on by two places.
    handed = captured.result()[0]["weights"][0, 0]
    assert bool((handed.diagonal(-2) > 0.98).all())
