"""Coefficients of a chunk: the triangular form is the recursion, which is the definition; nothing is divided."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.memory_coefficients import Running, advance, memory_coefficients

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def draw(steps: int, seed: int = 0, lead: tuple[int, ...] = (2,)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(*lead, steps, generator=generator, dtype=torch.float64) for _ in range(3))


def by_definition(theta, eta, alpha, real, gradients, memory, momentum):
    """M and S behind every step of one row, from the two equations alone."""
    found = []
    for t in range(len(theta)):
        if real[t]:
            momentum = eta[t] * momentum - theta[t] * gradients[t]
            memory = (1 - alpha[t]) * memory + momentum
        found.append((memory, momentum))
    return found


@given(steps=st.integers(1, 20), seed=st.integers(0, 99), holes=st.floats(0, 0.9))
@settings(max_examples=30, deadline=None)
def test_they_give_memory_and_momentum_of_the_definition(steps, seed, holes):
    theta, eta, alpha = (x[0] for x in draw(steps, seed))
    generator = torch.Generator().manual_seed(seed + 1)
    real = torch.rand(steps, generator=generator) >= holes
    gradients = torch.randn(steps, generator=generator, dtype=torch.float64)
    memory, momentum = torch.randn(2, generator=generator, dtype=torch.float64)
    expected = by_definition(theta, eta, alpha, real, gradients, memory, momentum)
    for mode in ("block", "reference"):
        c = memory_coefficients(theta, eta, alpha, real=real, mode=mode)
        said = c.decay * memory + c.carry * momentum - c.gradient @ gradients
        pace = c.momentum * momentum - c.pushed @ gradients
        torch.testing.assert_close(said, torch.stack([m for m, _ in expected]), **TIGHT)
        torch.testing.assert_close(pace, torch.stack([s for _, s in expected]), **TIGHT)


@given(steps=st.integers(2, 12), cut=st.integers(1, 11), seed=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_two_parts_of_a_chunk_are_the_chunk(steps, cut, seed):
    cut = min(cut, steps - 1)
    theta, eta, alpha = draw(steps, seed)
    whole = memory_coefficients(theta, eta, alpha)
    early = torch.arange(steps) < cut
    first = memory_coefficients(theta, eta, alpha, real=early)
    second = memory_coefficients(theta, eta, alpha, real=~early).after(first.at(steps - 1))
    for a, b in zip(second.at(steps - 1).tensors(), whole.at(steps - 1).tensors(), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_forgetting_everything_is_exact_where_a_quotient_of_products_is_not():
    theta, eta, alpha = torch.full((16,), 0.1), torch.full((16,), 0.5), torch.ones(16)
    alpha[3] = 0.25
    c = memory_coefficients(theta, eta, alpha)
    assert bool(torch.isfinite(c.gradient).all())
    # α = 1 leaves the memory at S_t alone.
    torch.testing.assert_close(c.gradient[-1], c.pushed[-1])
    assert float(c.decay[-1]) == 0
    products = (1 - alpha).cumprod(0)
    assert bool(torch.isnan(products[:, None] / products[None]).any())


def test_a_step_that_is_not_real_changes_nothing_though_momentum_is_large():
    theta, eta, alpha = draw(6)
    real = torch.tensor([1, 1, 1, 0, 0, 1], dtype=torch.bool)
    c = memory_coefficients(theta, eta, alpha, real=real.expand(2, 6))
    for a, b in zip(c.at(2).tensors(), c.at(4).tensors(), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    # θ = 0 alone is a step: the old momentum moves the memory on.
    still = torch.where(real, theta, 0.0)
    assert not torch.allclose(memory_coefficients(still, eta, alpha).carry[:, 4], c.carry[:, 4])


def test_step_size_zero_leaves_decay_alone():
    _, eta, alpha = draw(9)
    c = memory_coefficients(torch.zeros_like(eta), eta, alpha)
    assert not c.gradient.any()
    torch.testing.assert_close(c.decay, (1 - alpha).cumprod(-1), **TIGHT)


def test_what_is_read_before_a_step_is_what_was_behind_the_last():
    c = memory_coefficients(*draw(5))
    before = c.shifted()
    start = Running.start((2,), 5, c.decay)
    for a, b in zip(before.at(0).tensors(), start.tensors(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(before.at(3).tensors(), c.at(2).tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_one_step_at_a_time_with_a_slot_of_its_own_for_each_row():
    theta, eta, alpha = draw(3)
    now = Running.start((2,), 4, theta)
    for t in range(3):
        slot = torch.tensor([t, t + 1])
        now = advance(now, theta[:, t], eta[:, t], alpha[:, t], slot, torch.tensor([True, True]))
    c = memory_coefficients(theta, eta, alpha)
    torch.testing.assert_close(now.gradient[0, :3], c.gradient[0, -1], **TIGHT)
    torch.testing.assert_close(now.gradient[1, 1:], c.gradient[1, -1], **TIGHT)


@pytest.mark.parametrize("which", range(3))
def test_gradients_reach_every_gate(which):
    gates = [x[:1].requires_grad_(i == which) for i, x in enumerate(draw(5))]

    def run(*given: torch.Tensor) -> torch.Tensor:
        c = memory_coefficients(*given)
        return torch.cat([c.decay, c.carry, c.gradient.flatten(1)], 1)

    assert torch.autograd.gradcheck(run, gates)


def test_bad_arguments_are_named():
    theta, eta, alpha = draw(4)
    with pytest.raises(ArgumentError, match="theta, eta, alpha: got"):
        memory_coefficients(theta, eta[:, :3], alpha)
    with pytest.raises(ArgumentError, match="mode"):
        memory_coefficients(theta, eta, alpha, mode="quick")
