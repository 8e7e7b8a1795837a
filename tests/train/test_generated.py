"""Generated tasks: their answers follow from what a row shows, their chance level is what a guess gets."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headway.errors import ArgumentError
from headway.train.generated import TASKS, Copy, KeyValue, Recall, StateTracking, group_table, score

EXAMPLES = [
    Recall(pairs=4, gap=6, rows=8),
    Recall(pairs=5, questions=3, tokens=64, rows=8),
    KeyValue(pairs=6, rows=8),
    Copy(count=7, gap=3, rows=8),
    StateTracking(group="S3", count=9, rows=8),
    StateTracking(group="parity", count=9, rows=8),
]
every_task = pytest.mark.parametrize("task", EXAMPLES, ids=lambda task: f"{task.name}-{task.vocabulary}")


def scored_places(batch):
    """(row, place) of every scored label."""
    return (batch["labels"] != -100).nonzero().tolist()


@every_task
def test_ids_fit_the_vocabulary_and_rows_have_the_length_that_is_said(task):
    batch = task.batch(3)
    assert batch["input_ids"].shape == batch["labels"].shape == (task.rows, task.length)
    assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < task.vocabulary
    assert int(batch["labels"].max()) < task.vocabulary
    assert bool((batch["labels"][:, 0] == -100).all())


@every_task
def test_a_batch_depends_on_its_seed_and_number_alone(task):
    again = replace(task, position=0)
    for _ in range(3):
        next(again)
    assert torch.equal(next(again)["input_ids"], task.batch(3)["input_ids"])
    assert not torch.equal(task.batch(3)["input_ids"], task.batch(4)["input_ids"])
    other = replace(task, seed=1)
    assert not torch.equal(task.batch(3)["input_ids"], other.batch(3)["input_ids"])


@every_task
def test_the_place_in_the_stream_can_be_stored_and_found(task):
    task.position = 5
    state = task.state()
    expected = next(task)
    task.position = 0
    task.restore(state)
    assert torch.equal(next(task)["input_ids"], expected["input_ids"])


@every_task
def test_held_out_batches_are_none_of_those_trained_on(task):
    kept = task.held_out(2)
    for index in range(20):
        assert not any(torch.equal(task.batch(index)["input_ids"], batch["input_ids"]) for batch in kept)


@given(pairs=st.integers(1, 8), seed=st.integers(0, 10**6), spread=st.booleans())
@settings(max_examples=40, deadline=None)
def test_recall_asks_for_what_the_pairs_say(pairs, seed, spread):
    task = Recall(pairs=pairs, keys=9, values=10, noise=3, rows=4, seed=seed,
                  **({"tokens": 4 * pairs + 11} if spread else {"gap": 5}))  # fmt: skip
    batch = task.batch(0)
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs
        assert len(set(told.values())) == pairs
        places = [i for i, label in enumerate(labels) if label != -100]
        assert len(places) == pairs
        assert len({row[i - 1] for i in places}) == pairs
        for i in places:
            assert told[row[i - 1]] == labels[i] == row[i]
            assert i > 2 * pairs + (0 if spread else 5)


def test_spread_questions_come_mostly_soon_and_reach_to_the_end():
    task = Recall(pairs=2, questions=1, tokens=104, rows=400)
    places = np.array([place for _, place in scored_places(task.batch(0))])
    distances = (places - 1 - 4) // 2
    assert np.median(distances) < 15
    assert distances.max() > 35


def test_key_value_needs_the_whole_key():
    task = KeyValue(pairs=12, symbols=4, key_length=2, rows=16)
    shared = 0
    for row, labels in zip(*(task.batch(0)[name].tolist() for name in ("input_ids", "labels")), strict=True):
        told = {tuple(row[3 * i : 3 * i + 2]): row[3 * i + 2] for i in range(12)}
        assert len(told) == 12
        asked = tuple(row[-3:-1])
        assert told[asked] == labels[-1]
        shared += sum(key[0] == asked[0] for key in told) > 1
    assert shared == 16


def test_keys_from_a_huge_alphabet_are_distinct():
    task = KeyValue(pairs=8, symbols=60, key_length=4, rows=32)
    for row in task.batch(0)["input_ids"].tolist():
        assert len({tuple(row[5 * i : 5 * i + 4]) for i in range(8)}) == 8


def test_copy_repeats_what_stood_before_the_mark():
    batch = Copy(count=5, gap=2, symbols=9, rows=6).batch(0)
    ids, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(ids[:, :5], labels[:, -5:])
    assert bool((ids[:, 5:7] == 9).all())
    assert bool((ids[:, 7] == 10).all())


def test_parity_counts_the_ones():
    batch = StateTracking(group="parity", count=12, rows=5).batch(0)
    bits = batch["input_ids"][:, :-1]
    assert torch.equal(batch["labels"][:, 1:] - 2, bits.cumsum(1) % 2)


@pytest.mark.parametrize("group", ["S3", "S4", "A5", "S5"])
def test_states_are_running_products_of_permutations(group):
    things = int(group[1:])
    elements = [p for p in permutations(range(things)) if group[0] == "S" or even(p)]
    assert len(group_table(group)) == len(elements)
    task = StateTracking(group=group, count=6, rows=3)
    batch = task.batch(0)
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        places = list(range(things))
        for i in range(6):
            places = [elements[row[i]][place] for place in places]
            assert elements[labels[i + 1] - task.size] == tuple(places)


@pytest.mark.parametrize("group", ["parity", "Z60", "S3", "A5"])
def test_tables_are_groups(group):
    table = group_table(group)
    size = len(table)
    assert (table[0] == np.arange(size)).all()
    assert (table[:, 0] == np.arange(size)).all()
    assert all(len(set(line)) == size for line in table.tolist())
    a, b, c = np.random.default_rng(0).integers(0, size, (3, 50))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


def even(permutation) -> bool:
    return np.linalg.det(np.eye(len(permutation))[list(permutation)]) > 0


class Guess(nn.Module):
    """Tells, at each place, one of the tokens that a guess would choose from, with all its trust."""

    def __init__(self, choose, vocabulary) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.choose, self.vocabulary = choose, vocabulary

    def forward(self, ids):
        chosen = torch.stack([self.choose(row) for row in ids])
        return nn.functional.one_hot(chosen, self.vocabulary).float() + self.weight


def test_chance_is_what_a_guess_among_the_values_gets():
    task = Recall(pairs=4, questions=1, gap=3, rows=200)
    first = Guess(lambda row: row[1].expand(len(row)), task.vocabulary)
    assert score(first, task.held_out(4))["accuracy"] == pytest.approx(task.chance, abs=0.05)
    task = KeyValue(pairs=5, rows=200)
    first = Guess(lambda row: row[2].expand(len(row)), task.vocabulary)
    assert score(first, task.held_out(4))["accuracy"] == pytest.approx(task.chance, abs=0.05)
    task = StateTracking(group="S3", count=10, rows=100)
    same = Guess(lambda row: torch.full((len(row),), task.size), task.vocabulary)
    assert score(same, task.held_out(4))["accuracy"] == pytest.approx(task.chance, abs=0.03)


def test_chance_of_all_questions_knows_what_was_answered_already():
    assert Recall(pairs=3, gap=0).chance == pytest.approx((1 / 3 + 1 / 2 + 1) / 3)


def test_a_model_that_knows_scores_one():
    task = Copy(count=4, rows=8)
    knows = Guess(lambda row: row.roll(-1), task.vocabulary)
    assert task.scorer(2)(knows)["validation_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Recall(pairs=0, gap=1), "pairs: got 0 for recall"),
        (lambda: Recall(pairs=40, gap=1), "pairs: got 40 with 32 keys"),
        (lambda: Recall(pairs=4, questions=5, gap=1), "5 questions"),
        (lambda: Recall(), "gap, tokens: got None and None"),
        (lambda: Recall(gap=1, tokens=99), "gap, tokens: got 1 and 99"),
        (lambda: Recall(pairs=4, tokens=15), "tokens: got 15, expected at least 16"),
        (lambda: KeyValue(pairs=9, symbols=2, key_length=3), "at most 8 different keys"),
        (lambda: Copy(symbols=1), "symbols: got 1 for copy, expected a whole number of at least 2"),
        (lambda: StateTracking(group="S6"), "group: got 'S6', expected one of parity"),
        (lambda: Copy(rows=0), "rows: got 0"),
    ],
)
def test_numbers_that_make_no_task_are_named(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_every_task_is_known_by_its_name():
    assert {task.name for task in EXAMPLES} == set(TASKS)
