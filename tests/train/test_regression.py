"""Piecewise regression as a stream: its tokens hold the task's own data, and its chance level is what zero gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headway.errors import ArgumentError
from headway.train import train
from headway.train.regression import PiecewiseRegression, regression_loss


class Constant(nn.Module):
    """Answers the same vector everywhere."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.zeros(dim))

    def forward(self, inputs):
        return self.answer.expand(*inputs.shape[:2], -1)


def test_tokens_hold_pairs_and_then_questions_without_their_values():
    task = PiecewiseRegression(dim=4, segments=2, per_segment=5, queries=3, rows=6)
    batch = task.batch(0)
    assert batch["inputs"].shape == (6, task.length, task.width) == (6, 13, 9)
    asks = batch["inputs"][..., -1]
    assert torch.equal(asks[0], torch.tensor([0.0] * 10 + [1.0] * 3))
    assert bool((batch["inputs"][:, 10:, 4:8] == 0).all())
    assert bool((batch["inputs"][:, :10, 4:8] != 0).all())


def test_one_segment_without_noise_is_a_linear_map_that_least_squares_finds():
    batch = PiecewiseRegression(dim=3, segments=1, per_segment=12, queries=2, noise=0.0, rows=5).batch(7)
    key, value, query = batch["inputs"][:, :12, :3], batch["inputs"][:, :12, 3:6], batch["inputs"][:, 12:, :3]
    maps = torch.linalg.lstsq(key, value).solution
    torch.testing.assert_close(query @ maps, batch["targets"], atol=1e-4, rtol=1e-3)


def test_chance_is_the_error_of_answering_zero_and_training_a_constant_stays_there():
    task = PiecewiseRegression(dim=6, rows=64)
    net = Constant(6)
    zero = float(regression_loss(net, task.batch(0)).value.detach())
    assert zero == pytest.approx(task.chance, rel=0.1)
    found = train(net, task, steps=5, loss=regression_loss, learning_rate=1e-3, validation=task.held_out(2))
    assert found.column("validation_loss")[-1] == pytest.approx(task.chance, rel=0.1)
    assert task.position == 5


def test_batches_depend_on_seed_and_number_alone():
    one, other = PiecewiseRegression(rows=2), PiecewiseRegression(rows=2, seed=1)
    assert torch.equal(one.batch(3)["inputs"], PiecewiseRegression(rows=2).batch(3)["inputs"])
    assert not torch.equal(one.batch(3)["inputs"], other.batch(3)["inputs"])
    assert not torch.equal(one.held_out(1)[0]["inputs"], one.batch(1)["inputs"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PiecewiseRegression(rows=0), "rows, queries: got 0"),
        (lambda: PiecewiseRegression(dim=0).batch(0), "dim: got 0"),
        (lambda: regression_loss(Constant(3), {"inputs": torch.zeros(1)}), r"batch: got \['inputs'\]"),
        (
            lambda: regression_loss(Constant(3), PiecewiseRegression(rows=2).batch(0)),
            r"model: got \(2, 16, 3\) at the queries, expected \(2, 16, 8\)",
        ),
    ],
)
def test_what_cannot_be_used_is_named(call, words):
    with pytest.raises(ArgumentError, match=words):
        call()
