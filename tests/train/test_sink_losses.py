"""Losses against sinks and outliers: exact values on planted states and maps."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError
from headway.train.sink_losses import decorrelation_loss, head_balance_loss, non_sink_mass, tail_penalty


def test_decorrelation_is_the_mean_cosine_with_the_first_state():
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]])
    torch.testing.assert_close(decorrelation_loss(hidden), torch.tensor((1 + 0 - 1) / 3))


def test_decorrelation_leaves_padding_out_and_finds_the_first_real_token():
    hidden = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    hidden[:, [0, 3]] = torch.nan
    mask = torch.tensor([[False, True, True, False]])
    hidden.requires_grad_()
    loss = decorrelation_loss(hidden, mask)
    torch.testing.assert_close(loss, torch.tensor(0.5**0.5))
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert bool(torch.isfinite(gradient).all())
    assert not bool(gradient[~mask].any())


def test_decorrelation_of_lone_tokens_is_zero():
    assert float(decorrelation_loss(torch.randn(3, 1, 4))) == 0.0


def test_a_step_down_its_gradient_turns_the_states_apart():
    hidden = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)) + 2.0
    hidden.requires_grad_()
    before = decorrelation_loss(hidden)
    gradient = torch.autograd.grad(before, hidden)[0]
    assert float(decorrelation_loss((hidden - 5 * gradient).detach())) < float(before.detach())


def test_the_tail_penalty_is_zero_inside_and_a_power_beyond():
    x = torch.tensor([[1.0, -2.0], [4.0, -6.0]])
    assert float(tail_penalty(x, threshold=6.0)) == 0.0
    torch.testing.assert_close(tail_penalty(x, threshold=2.0, power=2), torch.tensor((1.0 + 4.0) / 4))
    torch.testing.assert_close(
        tail_penalty(x, threshold=2.0, power=1, mask=torch.tensor([True, False])), torch.tensor(0.0)
    )
    with pytest.raises(ArgumentError, match="threshold, power: got 0"):
        tail_penalty(x, threshold=0)


def test_non_sink_mass_leaves_the_sinks_out():
    weights = torch.tensor([[[[0.7, 0.2, -0.1]]]])
    torch.testing.assert_close(non_sink_mass(weights), torch.tensor([[[0.3]]]))
    torch.testing.assert_close(non_sink_mass(weights, (0, 2)), torch.tensor([[[0.2]]]))
    with pytest.raises(ArgumentError, match="sinks: got key 3"):
        non_sink_mass(weights, (3,))


def test_heads_in_turn_are_balanced_and_one_head_alone_is_not():
    turns = torch.eye(4).repeat(1, 2)[None]
    torch.testing.assert_close(head_balance_loss(turns), torch.tensor(1.0))
    alone = torch.zeros(1, 4, 8)
    alone[:, 2] = 1.0
    torch.testing.assert_close(head_balance_loss(alone), torch.tensor(4.0))


def test_queries_of_sinks_alone_and_padding_count_nothing():
    mass = torch.zeros(1, 2, 4)
    mass[0, 0, 1], mass[0, 1, 2], mass[0, 0, 3] = 0.5, 0.1, 9.0
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(head_balance_loss(mass, mask), torch.tensor(1.0))
    assert float(head_balance_loss(torch.zeros(1, 2, 4))) == 0.0


def test_the_gradient_of_the_balance_goes_to_the_mass_of_the_busy_head():
    mass = torch.tensor([[[0.6, 0.6, 0.6], [0.4, 0.4, 0.4]]], requires_grad=True)
    gradient = torch.autograd.grad(head_balance_loss(mass), mass)[0]
    assert bool((gradient[0, 0] > 0).all())
    assert bool((gradient[0, 1] < 0).all())


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ArgumentError, match="mask"):
        decorrelation_loss(torch.randn(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
