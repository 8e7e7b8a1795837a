"""Multiple choice: log-likelihoods of options, what counts as right, and the generated questions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import headway
from headway.errors import ArgumentError
from headway.hosts import default_text
from headway.tasks.choice import (
    TASKS,
    Choices,
    Question,
    choice_batches,
    make_questions,
    score_choices,
)
from tests.door.hosts import CAUSAL


class Words:
    """A tokenizer of words; an id for each."""

    def __init__(self):
        self.ids = {}

    def __call__(self, text, **options):
        return {"input_ids": [self.ids.setdefault(word, 3 + len(self.ids)) for word in text.split()]}


class Bigram(nn.Module):
    """p(next | last) from a table, so that every score is known."""

    def __init__(self, size=90):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(size, size, generator=generator))

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids])


def by_hand(model, tokenizer, question):
    found = []
    for option in question.options:
        context = tokenizer(question.context)["input_ids"]
        tokens = tokenizer(question.context + option)["input_ids"]
        rows = model.table.detach()[torch.tensor(tokens)].log_softmax(-1)
        found.append(sum(float(rows[i - 1, tokens[i]]) for i in range(len(context), len(tokens))))
    return found


QUESTIONS = [
    Question(task="a", context="one two three", options=(" four", " five six", " seven eight nine"), answer=1),
    Question(task="b", context="one", options=(" two", " ten"), answer=0),
    Question(task="a", context="a b c d e f g", options=(" one", " two", " four"), answer=2),
]


def test_scores_are_sums_of_log_probabilities_in_any_batch():
    model, tokenizer = Bigram(), Words()
    for rows in (1, 2, 16):
        found = score_choices(model, tokenizer, QUESTIONS, rows=rows)
        for question, scores in zip(QUESTIONS, found.scores, strict=True):
            np.testing.assert_allclose(scores, by_hand(model, tokenizer, question), rtol=1e-5)


def test_options_of_one_token_share_a_row_and_others_do_not():
    batches = choice_batches(Words(), QUESTIONS)
    assert sum(batch.ids.shape[0] for batch in batches) == 3 + 1 + 1
    assert sum(len(batch.reads) for batch in batches) == (1 + 2 + 3) + 2 + 3


def test_a_real_host_gives_what_one_row_at_a_time_gives():
    """Padding on the right and the choice of logits change nothing."""
    model = CAUSAL["llama"]()
    together = score_choices(model, Words(), QUESTIONS)
    for i, question in enumerate(QUESTIONS):
        tokenizer = Words()
        for q in QUESTIONS:
            for option in q.options:
                tokenizer(q.context + option)
        alone = score_choices(model, tokenizer, [question], rows=1)
        again = score_choices(model, tokenizer, QUESTIONS)
        np.testing.assert_allclose(alone.scores[0], again.scores[i], atol=1e-4)
    assert len(together.scores) == 3


def test_what_is_right_normalised_and_probable():
    questions = (
        Question(task="a", context="x", options=(" a", " abcdefg"), answer=1),
        Question(task="b", context="x", options=(" a", " b", " c", " d"), answer=0),
    )
    found = Choices(questions=questions, scores=(np.array([-2.0, -4.0]), np.log(np.array([0.4, 0.1, 0.2, 0.1]))))
    assert found.correct.tolist() == [0.0, 1.0]
    assert found.correct_normalised.tolist() == [1.0, 1.0]
    assert found.probability.tolist() == pytest.approx([1 / (1 + math.exp(2)), 0.5])
    assert found.accuracy == 0.5
    assert found.chance == pytest.approx(3 / 8)
    assert {k: v.tolist() for k, v in found.by_task(found.correct).items()} == {"a": [0.0], "b": [1.0]}


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_seeded_and_have_one_right_answer_each(task):
    text = default_text().text
    found = make_questions(task, 30, seed=3, text=text)
    assert found == make_questions(task, 30, seed=3, text=text)
    assert found != make_questions(task, 30, seed=4, text=text)
    assert len({q.context for q in found}) == 30
    assert {q.answer for q in found} == {0, 1, 2, 3}
    assert all(len(q.options) == 4 and q.options[q.answer].startswith(" ") for q in found)


def test_the_right_answer_is_the_one_that_was_planted():
    for question in make_questions("place", 20):
        story, _, asked = question.context.partition("\n")
        who = asked.split("Where is ")[1].split("?")[0]
        assert f"{who} is in the{question.options[question.answer]}." in story
        assert all(option.strip() in story for option in question.options)
    text = " ".join(default_text().text.split())
    for task in ("ending", "word"):
        for question in make_questions(task, 20, text=default_text().text):
            assert question.context + question.options[question.answer] in text


def test_whatever_is_attached_is_measured():
    model = CAUSAL["llama"]()
    dense = score_choices(model, Words(), QUESTIONS)
    with headway.use(model, headway.door.HeadGate(gates={(0, 0): 0.0})):
        changed = score_choices(model, Words(), QUESTIONS)
    assert not np.allclose(dense.scores[0], changed.scores[0], atol=1e-4)


def test_bad_questions_and_counts_are_named():
    with pytest.raises(ArgumentError, match="options: got"):
        Question(task="a", context="x", options=(" a", " a"), answer=0)
    with pytest.raises(ArgumentError, match="options: got"):
        Question(task="a", context="x", options=(" a",), answer=0)
    with pytest.raises(ArgumentError, match="answer: got 2"):
        Question(task="a", context="x", options=(" a", " b"), answer=2)
    with pytest.raises(ArgumentError, match="context: got nothing"):
        Question(task="a", context=" ", options=(" a", " b"), answer=0)
    with pytest.raises(ArgumentError, match=r"task: got 'places'.*Did you mean 'place'"):
        make_questions("places", 3)
    with pytest.raises(ArgumentError, match="count: got 0"):
        make_questions("place", 0)
    with pytest.raises(ArgumentError, match="text: got none"):
        make_questions("word", 3)
    with pytest.raises(ArgumentError, match="count: got 9000, expected at most"):
        make_questions("word", 9000, text=default_text().text)
    with pytest.raises(ArgumentError, match="rows, questions: got 16, 0"):
        choice_batches(Words(), [])
    with pytest.raises(ArgumentError, match="no token of its own"):
        choice_batches(Words(), [Question(task="a", context="x", options=(" ", "y"), answer=0)])
