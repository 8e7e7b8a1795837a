from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.tasks.answering import answer
from headway.tasks.needle import needle_grid, needle_sample, planted_score, value_ids
from headway.tasks.recall import recall_sample
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama
from tests.tasks.recaller import VOCABULARY, Recaller

TOKENIZER = byte_tokenizer()
HOST = tiny_llama()


def needle(depth: float, tokens: int = 400, seed: int = 0, **options):
    return needle_sample(TOKENIZER, tokens, depth, np.random.default_rng(seed), **options)


@pytest.mark.parametrize("text", [None, TEXT])
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_the_needle_stands_once_at_its_depth_and_the_prompt_fills_the_tokens(text, depth):
    sample = needle(depth, text=text)
    hay = sample.context.split("\n\n", 1)[1]
    assert hay.count(sample.meta["needle"]) == 1
    assert sample.context.count(sample.references[0]) == 1
    assert sample.references[0] not in sample.question + sample.prefix
    place = hay.index(sample.meta["needle"]) / (len(hay) - len(sample.meta["needle"]))
    assert abs(place - depth / 100) < 0.25
    assert depth == 50 or place == depth / 100
    assert 320 < sample.prompt_tokens + sample.max_new_tokens <= 400


def test_a_needle_is_found_by_a_model_that_recalls_and_not_beyond_its_window():
    samples = list(needle_grid(TOKENIZER, [400, 600], depths=[0, 50, 100], seed=3))
    assert [answer(Recaller(), TOKENIZER, s, question_aware=False).score for s in samples] == [1.0] * 6
    near = [answer(Recaller(keep=150), TOKENIZER, s, question_aware=False).score for s in samples]
    assert near == [0.0, 0.0, 1.0] * 2


def test_a_larger_grid_holds_the_samples_of_the_smaller_one():
    small = list(needle_grid(TOKENIZER, [400], depths=[10], seed=1))
    large = list(needle_grid(TOKENIZER, [400, 500], depths=[0, 10], repeats=2, seed=1))
    assert len(large) == 8
    assert small[0].context in [s.context for s in large]
    assert len({s.references for s in large}) == 8


def test_the_planted_score_of_a_known_model_is_known():
    sample = needle(50)
    found = planted_score(Recaller(), TOKENIZER, sample, question_aware=True)
    assert found.rank_one_rate == 1.0
    assert found.nll.numel() == 8
    assert found.mean_nll < 1e-4
    lost = planted_score(Recaller(keep=40), TOKENIZER, sample, question_aware=False)
    assert lost.rank_one_rate == 0.0
    assert math.isclose(float(lost.nll[0]), math.log(VOCABULARY), rel_tol=1e-5)


@pytest.mark.parametrize("aware", [True, False])
def test_the_planted_score_equals_that_of_one_forward(aware):
    sample = needle(50)
    value = torch.tensor([value_ids(TOKENIZER, sample)])
    with torch.no_grad():
        logits = HOST(torch.cat([sample.prompt_ids, value], 1)).logits[0, sample.prompt_tokens - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits, value[0], reduction="none")
    found = planted_score(HOST, TOKENIZER, sample, question_aware=aware, prefill_chunk=64)
    torch.testing.assert_close(found.nll, wanted, atol=1e-3, rtol=1e-3)
    assert found.rank_one.tolist() == (logits.argmax(-1) == value[0]).tolist()


def test_a_value_is_joined_to_its_prefix_by_a_space_where_one_belongs():
    assert TOKENIZER.decode(value_ids(TOKENIZER, needle(0)))[0] == " "
    quoted = recall_sample(TOKENIZER, 5, np.random.default_rng(0))
    assert TOKENIZER.decode(value_ids(TOKENIZER, quoted)) == quoted.references[0]


def test_bad_needles_are_refused():
    with pytest.raises(ArgumentError, match="depth: got 120"):
        needle(120)
    with pytest.raises(ArgumentError, match=r"tokens: got 50 for needle, expected at least \d+"):
        needle(0, tokens=50)
    with pytest.raises(ArgumentError, match="lengths, depths, repeats"):
        list(needle_grid(TOKENIZER, []))
